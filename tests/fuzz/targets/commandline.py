"""Command lines: refused in one line, or carried out without an unexpected exception.

An input is one byte that selects the parser, and words that end with a zero byte.  Commands of
qedimg that only read are run as well, in a directory with a few images; a word with a slash is
not passed to them.
"""

from __future__ import annotations

import functools
import io
import os
from contextlib import chdir, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Final
from unittest.mock import patch

from qedfuse.cli.qedfuse.arguments import (
    parse_arguments,
    parse_mount_helper_arguments,
    parse_umount_arguments,
)
from qedfuse.cli.qedimg import main as program
from qedfuse.errors import UsageError
from qedfuse.mount.optionparser import parse_options
from tests.fuzz.targets.scratch import scratch
from tests.fuzz.targets.target import Target, assert_line
from tests.support.disks import build_image

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_READING: Final = ("info", "check", "map", "compare", "measure", "dump", "freelist")
"""The commands that are run, unless an option makes them change a file."""
_COMMANDS: Final = tuple(program.COMMANDS)
_MAX_OUTPUT_CHARS: Final = 1 << 20


@functools.cache
def _images() -> Mapping[Path, bytes]:
    """Return the content of each file in the directory of the commands, which are made first."""
    directory = scratch("commandline")
    overlay = build_image(1 << 20, {3: b"o"}, backing=b"a.qed")
    damaged = build_image(1 << 20, {0: b"a", 1: 1 << 40})
    images = {
        "a.qed": bytes(build_image(1 << 20, {0: b"a" * 4096, 1: 1, 5: b"b"})),
        "o.qed": bytes(overlay),
        "d.qed": bytes(damaged),
        "r.raw": b"r" * 8192 + bytes(8192),
        "empty": b"",
        "-x": b"x" * 512,
    }
    for name, content in images.items():
        (directory / name).write_bytes(content)
    return {directory / name: content for name, content in images.items()}


def check(data: bytes) -> None:
    """Parse the words of an input, and run the command if it only reads."""
    words = [os.fsdecode(word) for word in data[1:].split(b"\0")]
    selector = data[0] if data else 0
    parsers = (_parse_mount, _parse_helper, _parse_umount, _qedimg)
    try:
        parsers[selector % len(parsers)](words)
    except UsageError as error:
        assert_line(error)


def _parse_mount(words: Sequence[str]) -> None:
    arguments = parse_arguments(words)
    parse_options(arguments.options, sloppy=arguments.sloppy)


def _parse_helper(words: Sequence[str]) -> None:
    arguments = parse_mount_helper_arguments(words)
    parse_options(arguments.options, sloppy=arguments.sloppy)


def _parse_umount(words: Sequence[str]) -> None:
    arguments = parse_umount_arguments(words)
    seconds = arguments.timeout_seconds
    assert seconds is None or 0 <= seconds <= 1e6


def _qedimg(words: Sequence[str]) -> None:
    """Parse a command line of qedimg, and run it if it only reads."""
    images = _images()
    output, errors = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(output),
        redirect_stderr(errors),
        chdir(scratch("commandline")),
        patch.dict(os.environ, QEDIMG_TRACEBACK="1"),
    ):
        if not _only_reads(words):
            return
        code = program.main(words)
    assert code in program.exit_codes(words[0]), f"exit code {code}"
    text = errors.getvalue()
    assert "Traceback" not in text
    assert all(line.isprintable() for line in text.splitlines())
    assert code or text == "" or text.startswith("qedimg: ")
    assert len(output.getvalue()) < _MAX_OUTPUT_CHARS
    for path, content in images.items():
        assert path.read_bytes() == content, f"{path.name} has changed"


def _only_reads(words: Sequence[str]) -> bool:
    """Return whether a command line is valid, and neither changes a file nor names one elsewhere.

    Raises:
        UsageError: The command line is not valid.
    """
    name = words[0]
    if name not in _COMMANDS:
        return False
    try:
        parsed = vars(program.make_parser(name).parse(words[1:]))
    except SystemExit:  # --help
        return False
    if name not in _READING or any("/" in word for word in words):
        return False
    changes = parsed.get("repair") or parsed.get("undo") or parsed.get("action") in ("on", "off")
    return not changes


def seeds() -> list[bytes]:
    """Return command lines of each parser."""
    lines = (
        *("0 a.qed mnt", "0 -o ro,foreground -f a.qed mnt", "0 --pidfile=p -d -r -- -x m"),
        *("1 a.qed /mnt -o rw,nosuid -s -f -v", "2 --timeout=5 /mnt", "2 -h", "2 --timeout nan m"),
        *("3 info a.qed", "3 info --allocation a.qed"),
        *("3 check d.qed", "3 check -r --dry-run d.qed", "3 check --output json a.qed"),
        *("3 map a.qed", "3 map -s 4K -l 1M --output json o.qed", "3 map --output picture a.qed"),
        *("3 compare a.qed r.raw", "3 compare -s -f qed -F raw a.qed r.raw", "3 measure a.qed"),
        *("3 measure --size 10G -O qed", "3 dump header a.qed", "3 dump l2 0 a.qed"),
        *("3 dump l1 d.qed", "3 freelist show a.qed", "3 map --output svg a.qed"),
        *("3 info --partitions r.raw", "3 create -f x.qed 10G", "3 resize a.qed -1G"),
        *("3 convert -O raw a.qed b", "3 commit o.qed", "3 rebase -b r.raw -F raw o.qed"),
        *("3 compact a.qed", "3 info -f raw -- -x", "3 info --output=json --backing-chain o.qed"),
    )  # fmt: skip
    return [bytes((int(line[0]),)) + line[2:].replace(" ", "\0").encode() for line in lines]


TARGET: Final = Target(
    check,
    seeds,
    tuple(
        f"{word}\0".encode()
        for word in (
            *(
                "-o",
                "-f",
                "-r",
                "--",
                "-",
                "",
                "-h",
                "--output",
                "json",
                "--size",
                "1E",
                "-1",
                "0x1",
            ),
            *(
                "9" * 20,
                "4K",
                "a.qed",
                "o.qed",
                "d.qed",
                "r.raw",
                "empty",
                "raw",
                "qed",
                "-s",
                "-l",
            ),
            *("-U", "-q", "-v", "--backing=any", "--cache-size=1", "--foreign=qemu", "\udcff"),
            *("٣", "1.5G", "--start-offset=8E", "--max-length=-1", "\n"),
        )
        if "\udcff" not in word
    ),
    max_bytes=300,
)
