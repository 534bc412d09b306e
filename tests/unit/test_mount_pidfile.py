"""Writing the pid file never blocks, and a reader never sees a part of it."""

from __future__ import annotations

import fcntl
import os
import resource
import stat
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qedfuse.errors import HostError
from qedfuse.mount.process.pidfile import PidFile

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE = b"%d\n" % os.getpid()


@pytest.fixture
def pidfile(tmp_path: Path) -> Path:
    """Name a pid file in a directory of its own."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "pid"


def test_a_fifo_without_a_reader_is_refused(pidfile: Path) -> None:
    """A FIFO without a reader is refused instead of waited for."""
    os.mkfifo(pidfile)
    file = PidFile(str(pidfile))
    with pytest.raises(HostError) as caught:
        file.write()
    assert str(caught.value) == (
        f"{pidfile}: cannot write the pid file: found a FIFO without a reader"
    )
    file.close()


def test_a_full_fifo_is_refused(pidfile: Path) -> None:
    """A full FIFO is refused instead of waited for."""
    os.mkfifo(pidfile)
    reader = os.open(pidfile, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(pidfile, os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)))
    file = PidFile(str(pidfile))
    with pytest.raises(HostError, match="Resource temporarily unavailable"):
        file.write()
    for number in (reader, writer):
        os.close(number)
    file.close()


def test_a_fifo_with_a_reader_gets_the_number(pidfile: Path) -> None:
    """A FIFO with a reader gets the process id, and stays when the mount ends."""
    os.mkfifo(pidfile)
    reader = os.open(pidfile, os.O_RDONLY | os.O_NONBLOCK)
    file = PidFile(str(pidfile))
    file.write()
    assert os.read(reader, 100) == LINE
    os.close(reader)
    file.remove()
    file.close()
    assert stat.S_ISFIFO(pidfile.stat().st_mode)


def test_a_reader_sees_the_old_content_or_the_new(pidfile: Path) -> None:
    """An existing pid file is replaced atomically."""
    pidfile.write_bytes(b"12345678\n")
    file = PidFile(str(pidfile))
    with pidfile.open("rb") as old:
        file.write()
        assert old.read() == b"12345678\n"
    assert pidfile.read_bytes() == LINE
    assert list(pidfile.parent.iterdir()) == [pidfile]
    file.remove()
    file.close()
    assert not list(pidfile.parent.iterdir())


@contextmanager
def full() -> Iterator[None]:
    """Refuse to let any file have a byte, as a full file system does.

    Not for the whole test: what is printed about it may go to a file as well.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failure_leaves_no_file(pidfile: Path) -> None:
    """A failed write leaves no new pid file."""
    file = PidFile(str(pidfile))
    with pytest.raises(HostError, match="cannot write the pid file: File too large"), full():
        file.write()
    assert not list(pidfile.parent.iterdir())
    file.remove()
    file.close()


def test_a_failure_leaves_an_old_file_unchanged(pidfile: Path) -> None:
    """A failed write leaves an existing pid file unchanged."""
    pidfile.write_bytes(LINE)
    file = PidFile(str(pidfile))
    with pytest.raises(HostError), full():
        file.write()
    file.remove()
    file.close()
    assert pidfile.read_bytes() == LINE


def test_a_file_in_an_unwritable_directory_is_written_in_place() -> None:
    """A writable file in an unwritable directory is written in place."""
    with tempfile.TemporaryDirectory() as name:
        pidfile = Path(name) / "pid"
        pidfile.write_bytes(b"12345678901234567890\n")
        pidfile.chmod(0o666)
        Path(name).chmod(0o555)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if os.getuid() == 0:
                    os.setgid(65534)
                    os.setuid(65534)
                PidFile(str(pidfile)).write()
                code = 0 if pidfile.read_bytes() == b"%d\n" % os.getpid() else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        Path(name).chmod(0o755)


@pytest.mark.parametrize("form", ["{path}", "/dev/fd/{descriptor}"])
def test_a_file_that_is_open_here_is_written_in_place(pidfile: Path, form: str) -> None:
    """A pid file that this process has open is written in place."""
    descriptor = os.open(pidfile, os.O_RDWR | os.O_CREAT)
    before = os.fstat(descriptor)
    file = PidFile(form.format(path=pidfile, descriptor=descriptor))
    file.write()
    assert os.pread(descriptor, 100, 0) == LINE
    assert os.path.samestat(pidfile.stat(), before)
    file.close()
    os.close(descriptor)


def test_a_file_that_was_removed_is_written_through_its_descriptor(pidfile: Path) -> None:
    """A removed pid file is written through its descriptor."""
    descriptor = os.open(pidfile, os.O_RDWR | os.O_CREAT)
    pidfile.unlink()
    file = PidFile(f"/dev/fd/{descriptor}")
    file.write()
    assert os.pread(descriptor, 100, 0) == LINE
    assert list(pidfile.parent.iterdir()) == []
    file.remove()
    file.close()
    os.close(descriptor)


def test_pid_files(tmp_path: Path) -> None:
    """A pid file has the process id, and is removed only while it still has it."""
    path = tmp_path / "pid"
    with closing(PidFile(str(path))) as file:
        assert not path.exists(), "the disk cannot be used yet"
        file.write()
        assert path.read_text() == f"{os.getpid()}\n"
        file.remove()
        assert not path.exists()
        file.remove()
        path.write_text("1\n")
        file.remove()
        assert path.exists()
        path.unlink()
        path.symlink_to(tmp_path / "other")
        file.write()
        assert path.read_text() == f"{os.getpid()}\n"
        assert not path.is_symlink()
        assert not (tmp_path / "other").exists(), "a link that came meanwhile was followed"
    for name in ("none/pid", "."):
        with pytest.raises(HostError, match="cannot write the pid file"):
            PidFile(str(tmp_path / name))


def test_a_pid_file_works_in_a_hidden_directory(tmp_path: Path) -> None:
    """A pid file is removed although a mount hides its directory."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run/pid")
    with closing(PidFile(str(tmp_path / "link"))) as file:
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        file.write()
        assert (tmp_path / "elsewhere" / "pid").read_text() == f"{os.getpid()}\n"
        file.remove()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_pid_file_may_be_a_pipe(tmp_path: Path) -> None:
    """A pid file may be a named or an inherited pipe, which is not removed."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reading, writing = os.pipe()
    named = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    for name, end in ((str(fifo), named), (f"/proc/self/fd/{writing}", reading)):
        with closing(PidFile(name)) as file:
            file.write()
            assert os.read(end, 100) == b"%d\n" % os.getpid()
            file.remove()
    assert fifo.exists()
    for fd in (reading, writing, named):
        os.close(fd)
