"""Real mounts for tests, made by the command that users run, and always cleaned up."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qedfuse.mount.system.mounttable import find_mount
from tests.support import extensions
from tests.support.programs import StrPath, code_of, run, start

if TYPE_CHECKING:
    import signal
    from collections.abc import Iterator

    from tests.support.programs import Process

WITHOUT_EXTENSION: Final = (
    "qedfuse: mounted without fallocate and lseek, so discards free no space: the "
    "extension was not built when qedfuse was installed\n"
)
"""What a mount reports if the extension beside pyfuse3 is not there."""


def without_notice(text: str) -> str:
    """Return the lines of a mount; leave out `WITHOUT_EXTENSION` if that line is expected."""
    return text if extensions.EXPECTED else text.replace(WITHOUT_EXTENSION, "")


COMMAND: Final = (sys.executable, "-m", "qedfuse")
KEEPS_NEED_CHECK: Final = """
import trio
from qedfuse.disk.state.needcheck import NeedCheck
async def wait(_self):
    await trio.sleep_forever()
NeedCheck.run = wait
"""
"""Code that a mount runs first, so that NEED_CHECK is cleared only when the image is closed.

Otherwise it is cleared when no table has changed for 5 seconds, as may happen on a busy machine
between two steps of a test.
"""
TIMEOUT: Final = 60.0
"""Seconds after which a command counts as hung."""


def command_line(prelude: str) -> tuple[str, ...]:
    """Return the command line of qedfuse, which runs the Python code ``prelude`` first."""
    return (sys.executable, "-c", f"{prelude}\n{code_of('qedfuse')}") if prelude else COMMAND


def qedfuse(
    *words: StrPath, cwd: StrPath | None = None, prelude: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, or until it has gone to the background.

    In a run without extensions `WITHOUT_EXTENSION` is removed from what it reports.

    ``prelude`` is Python code that the process runs before the command.
    """
    done = run("qedfuse", *words, timeout=TIMEOUT, prelude=prelude, cwd=cwd)
    done.stderr = without_notice(done.stderr)
    return done


def refused(*words: StrPath, code: int) -> str:
    """Run a mount that must fail with ``code``; return its message without the command's name."""
    done = qedfuse(*words)
    assert done.returncode == code, (done.returncode, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("qedfuse: ")
    assert done.stdout == ""
    return lines[0].removeprefix("qedfuse: ")


def is_mounted(mountpoint: StrPath) -> bool:
    """Return whether the mount table lists the mountpoint; this never waits for a server."""
    return find_mount(os.path.realpath(mountpoint)) is not None


def is_locked(image: Path) -> bool:
    """Return whether a process holds a lock on the image."""
    with image.open("rb") as file:
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found: int = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))[0]
        return found != fcntl.F_UNLCK


def clean_up(mountpoint: StrPath) -> None:
    """Unmount everything that is left at a mountpoint."""
    while is_mounted(mountpoint):
        subprocess.run(["umount", "-l", os.fspath(mountpoint)], check=True)


@contextmanager
def mounted(
    source: StrPath, mountpoint: StrPath, *options: StrPath, prelude: str = ""
) -> Iterator[Path]:
    """Mount in the background for the block; ``qedfuse umount`` at its end must succeed.

    The mountpoint is created if it is missing.  ``prelude`` is Python code that the mount runs
    first.
    """
    directory = Path(mountpoint)
    if not directory.exists():
        directory.mkdir()
    done = qedfuse(source, directory, *options, prelude=prelude)
    assert (done.returncode, done.stderr) == (0, ""), done
    try:
        yield directory
        done = qedfuse("umount", directory)
        # A mount namespace that another process makes meanwhile keeps a copy for a moment.
        lines = [line for line in done.stderr.split("\n") if "still mounted at" not in line]
        assert (done.returncode, lines) == (0, [""]), done
        assert not is_mounted(directory)
    finally:
        clean_up(directory)


UNPROTECTED: Final = "not protected while memory is short"
"""Part of a log line that occurs without CAP_SYS_RESOURCE, as in most containers."""

IO_FLUSHER: Final = 0x0018_0000
"""PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE of linux/sched.h: what PR_SET_IO_FLUSHER sets."""

_CAP_SYS_RESOURCE: Final = 24


def may_be_io_flusher() -> bool:
    """Return whether this process has CAP_SYS_RESOURCE, which PR_SET_IO_FLUSHER needs."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    capabilities = int(status.partition("\nCapEff:")[2].split()[0], 16)
    return bool(capabilities >> _CAP_SYS_RESOURCE & 1)


def io_flusher_flags(pid: int) -> dict[str, int]:
    """Return for each thread of a process, by its id, which flags of `IO_FLUSHER` it has."""
    flags = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        flags[task.name] = int(fields[6]) & IO_FLUSHER
    return flags


_KEPT: Final = ((UNPROTECTED, "unprotected"), (": sandbox on: ", "sandbox"))
"""Parts of the lines that `FrontMount` keeps apart, and the attributes with these lines."""


class FrontMount:
    """A mount whose process stays in the foreground, so that a test sees its exit and its log.

    Attributes:
        process: The process.
        mountpoint: The mountpoint.
        unprotected: Lines of its log with `UNPROTECTED`.  They depend on the machine, so
            `read_line` and `finish` leave them out.  In a run without extensions the two methods
            leave out `WITHOUT_EXTENSION` as well.
        sandbox: Lines of its log about the sandbox, which `read_line` and `finish` leave out as
            well.
    """

    def __init__(self, process: Process, mountpoint: Path) -> None:
        """Wrap a process that has mounted."""
        self.process = process
        self.mountpoint = mountpoint
        self.unprotected: list[str] = []
        self.sandbox: list[str] = []
        self._received = ""

    def _is_about_machine(self, line: str) -> bool:
        """Return whether a line depends on the machine; keep it in one of the lists."""
        kept = next((x for x in _KEPT if x[0] in line), None)
        if kept is not None:
            getattr(self, kept[1]).append(line.rstrip("\n"))
        return kept is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def read_line(self) -> str:
        """Wait for the next line of its log and return it; an empty one if the log has ended."""
        while True:
            line, newline, rest = self._received.partition("\n")
            if not newline and (more := self._receive()):
                self._received += more
                continue
            self._received = rest
            if newline and not without_notice(line + newline):
                continue
            if not self._is_about_machine(line):
                return line + newline

    def wait_for_sandbox(self) -> None:
        """Wait for the line of its log about the sandbox, which is the last one of the start."""
        while not any(": sandbox on: " in line for line in self._received.splitlines()):
            more = self._receive()
            assert more, self._received
            self._received += more

    def _receive(self) -> str:
        """Wait for more of its log and return it; an empty string if the log has ended."""
        assert self.process.stderr is not None
        ready, _, _ = select.select([self.process.stderr], [], [], TIMEOUT)
        assert ready, "no line in the log"
        return os.read(self.process.stderr.fileno(), 1 << 16).decode(errors="backslashreplace")

    def finish(self) -> tuple[int, str]:
        """Wait for its exit; return the exit code and the rest of the log."""
        _out, log = self.process.communicate(timeout=TIMEOUT)
        log = without_notice(self._received + log)
        self._received = ""
        lines = log.splitlines(keepends=True)
        return self.process.wait(), "".join(x for x in lines if not self._is_about_machine(x))


@contextmanager
def front(*words: StrPath, prelude: str = "") -> Iterator[FrontMount]:
    """Mount in the foreground for the block; the last of ``words`` is the mountpoint.

    ``prelude`` is Python code that the process runs before the command.
    """
    mountpoint = Path(words[-1])
    if not mountpoint.exists():
        mountpoint.mkdir()
    reading, writing = os.pipe()
    process = start(
        "qedfuse",
        # The pid file is a pipe: a line in it means that the disk is ready.
        ["-f", "--pidfile", f"/proc/self/fd/{writing}", *words],
        prelude=prelude,
        stdout=subprocess.DEVNULL,
        pass_fds=[writing],
    )
    os.close(writing)
    try:
        with open(reading, "rb", buffering=0) as pipe:  # noqa: PTH123  a descriptor
            line = pipe.readline()
        assert line == b"%d\n" % process.pid, (line, process.communicate(timeout=TIMEOUT))
        yield FrontMount(process, mountpoint)
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
        clean_up(mountpoint)
