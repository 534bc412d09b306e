"""Thin wrappers of QEMU's tools, the reference for what a QED image is.

Each function runs one command and returns its output, as data where the tool supports that.
A command that fails raises `QemuError` with its whole output.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

StrPath: TypeAlias = str | os.PathLike[str]

TIMEOUT: Final = 120.0
"""Seconds after which a tool counts as hung."""

_MAX_BASE_BYTES: Final = 128 << 20
"""More than any base on a server has."""

_PROMPT: Final = b"qemu-io> "


class QemuError(Exception):
    """A QEMU tool failed; the message holds the command, its exit code and its output."""


@dataclass(frozen=True)
class CheckResult:
    """The result of ``qemu-img check``; ``code`` is 0 clean, 1 failed, 2 errors, 3 leaks."""

    code: int
    data: dict[str, Any]
    text: str

    @property
    def errors(self) -> int:
        """How many errors worse than leaks there are."""
        return int(self.data.get("corruptions", 0))

    @property
    def leaks(self) -> int:
        """How many clusters are leaked, as QEMU counts: too many where clusters are small."""
        return int(self.data.get("leaks", 0))


def run(*command: StrPath, codes: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end; an exit code that is not in ``codes`` raises `QemuError`."""
    done = subprocess.run(
        [os.fspath(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode not in codes:
        words = " ".join(map(str, command))
        msg = f"{words}: exit code {done.returncode}: {done.stdout}{done.stderr}"
        raise QemuError(msg)
    return done


def create(
    path: StrPath,
    size: int | None = None,
    *,
    image_format: str = "qed",
    cluster_size: int | None = None,
    table_size: int | None = None,
    backing: StrPath | None = None,
    backing_format: str = "qed",
) -> Path:
    """Make an image and return its path; sizes in bytes, ``table_size`` in clusters."""
    options = {"cluster_size": cluster_size, "table_size": table_size}
    given = ",".join(f"{name}={value}" for name, value in options.items() if value is not None)
    command: list[StrPath] = ["qemu-img", "create", "-q", "-f", image_format]
    if given:
        command += ["-o", given]
    if backing is not None:
        command += ["-b", backing, "-F", backing_format]
    command.append(path)
    if size is not None:
        command.append(str(size))
    run(*command)
    return Path(path)


def info(path: StrPath, *, force_share: bool = False) -> dict[str, Any]:
    """Return the output of ``qemu-img info``."""
    share = ("-U",) if force_share else ()
    data: dict[str, Any] = json.loads(run("qemu-img", "info", *share, "--output=json", path).stdout)
    return data


def check(path: StrPath, *, repair: str | None = None) -> CheckResult:
    """Check an image, and repair ``leaks`` or ``all`` if asked to.

    Defects of the image are in the result; only a check that could not be made raises.
    """
    fix = ("-r", repair) if repair else ()
    command = ("qemu-img", "check", "-f", "qed", *fix, "--output=json", path)
    done = run(*command, codes=(0, 2, 3))
    # A repair prints lines for people before the JSON.
    start = done.stdout.find("{")
    data = json.loads(done.stdout[start:]) if start >= 0 else {}
    return CheckResult(done.returncode, data, done.stdout + done.stderr)


def compare(
    first: StrPath, second: StrPath, *, first_format: str = "qed", second_format: str = "raw"
) -> bool:
    """Return whether two disks have the same content; past its end a disk counts as zeros."""
    formats = ("-f", first_format, "-F", second_format)
    return run("qemu-img", "compare", *formats, first, second, codes=(0, 1)).returncode == 0


def convert(
    source: StrPath,
    target: StrPath,
    *options: str,
    source_format: str = "qed",
    target_format: str = "raw",
) -> Path:
    """Copy a disk into a new image and return its path; ``options`` go to the tool."""
    formats = ("-f", source_format, "-O", target_format)
    run("qemu-img", "convert", *formats, *options, source, target)
    return Path(target)


def content(path: StrPath, *, image_format: str = "qed") -> bytes:
    """Return the content of a small disk, read through QEMU."""
    target = Path(f"{os.fspath(path)}.content")
    try:
        return convert(path, target, source_format=image_format).read_bytes()
    finally:
        target.unlink(missing_ok=True)


def content_over_url(overlay: StrPath, url: str, *, base_format: str = "qed") -> bytes:
    """Return the content of a small disk, read through QEMU, which reads its base from ``url``.

    The first request asks for all of the base.  Over any web server, QEMU 7.2 hangs now and then
    with several requests in flight, and QEMU 10.0 with several one after the other.
    """
    copy = Path(f"{os.fspath(overlay)}.copy")
    server: dict[str, Any] = {"driver": url.partition(":")[0], "url": url}
    server["readahead"] = _MAX_BASE_BYTES
    if server["driver"] == "https":
        server["sslverify"] = False
    base = json.dumps({"driver": base_format, "file": server})
    shutil.copyfile(overlay, copy)
    try:
        run("qemu-img", "rebase", "-u", "-F", base_format, "-b", f"json:{base}", copy)
        return convert(copy, f"{copy}.raw", "-m", "1").read_bytes()
    finally:
        copy.unlink()
        Path(f"{copy}.raw").unlink(missing_ok=True)


def map_extents(path: StrPath, *, image_format: str = "qed") -> list[dict[str, Any]]:
    """Return the extents of a disk as ``qemu-img map`` lists them."""
    command = ("qemu-img", "map", "-f", image_format, "--output=json", path)
    extents: list[dict[str, Any]] = json.loads(run(*command).stdout)
    return extents


def io(
    path: StrPath,
    *commands: str,
    image_format: str = "qed",
    read_only: bool = False,
    force_share: bool = False,
) -> str:
    """Run qemu-io commands, such as ``write -P 0x5a 0 64k``, and return their output.

    A read whose pattern does not match (``read -P``) is a failure like any other.
    """
    command = _io_command(path, image_format, read_only=read_only, force_share=force_share)
    for words in commands:
        command += ["-c", words]
    done = run(*command)
    return done.stdout + done.stderr


class HeldImage:
    """A qemu-io that has an image open and takes commands."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Wrap a running qemu-io; wait until it has opened the image."""
        self._process = process
        self.pid = process.pid
        self._answer()

    def command(self, words: str) -> str:
        """Run one command and return its output."""
        assert self._process.stdin is not None
        self._process.stdin.write(words.encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        """Return the output up to the next prompt."""
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        answer = b""
        while not answer.endswith(_PROMPT):
            if not select.select([output], [], [], TIMEOUT)[0]:
                msg = f"qemu-io: no answer in {TIMEOUT} s after {answer!r}"
                raise QemuError(msg)
            part = os.read(output, 1 << 16)
            if not part:
                msg = f"qemu-io ended: {answer.decode(errors='backslashreplace')}"
                raise QemuError(msg)
            answer += part
        return answer.removesuffix(_PROMPT).decode(errors="backslashreplace")


@contextmanager
def hold(
    path: StrPath,
    *,
    image_format: str = "qed",
    read_only: bool = False,
    force_share: bool = False,
) -> Iterator[HeldImage]:
    """Keep an image open in qemu-io inside the ``with`` block."""
    command = _io_command(path, image_format, read_only=read_only, force_share=force_share)
    with subprocess.Popen(
        [os.fspath(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            yield HeldImage(process)
            # The end of its input makes it close the image and end.
            process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()


def _io_command(
    path: StrPath, image_format: str, *, read_only: bool, force_share: bool
) -> list[StrPath]:
    """Return the command line of qemu-io."""
    command: list[StrPath] = ["qemu-io", "-f", image_format]
    if read_only or force_share:
        command.append("-r")
    if force_share:
        command.append("-U")
    return [*command, path]
