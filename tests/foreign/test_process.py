"""The life of the process of qemu-nbd: its end, the end of qedfuse, and what it leaves behind."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
import trio

import qedfuse
from qedfuse.disk.lookup.foreignopening import open_foreign
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import ForeignError, HostError, ImageInUseError
from qedfuse.foreign import opening, process, sandbox
from qedfuse.foreign.foreignfile import ForeignFile
from qedfuse.foreign.graph import Graph, Limits, open_graph
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.util import landlock
from tests.support import qemu
from tests.support.foreignchains import DISK_BYTES, draw_bottom, processes, servers
from tests.support.mounted import front, mounted
from tests.support.mounted import qedfuse as command
from tests.support.programs import environment, qedimg, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.hostio.hostfile import HostFile


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give an image whose first 2 MiB are data."""
    path = qemu.create(tmp_path / "image.qcow2", DISK_BYTES, image_format="qcow2")
    qemu.io(path, "write -P 7 0 2M", image_format="qcow2")
    return path


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fail after some seconds."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def server_of(path: Path) -> int:
    """Return the id of the only process that serves images of the directory of a file."""
    (found,) = servers(path.parent)
    return found


def test_server_killed(image: Path, tmp_path: Path) -> None:
    """After the end of qemu-nbd reads that need it get EIO, with one log line; the mount ends."""
    qemu.io(image, "write -c -P 8 2M 64k", "write -c -P 8 2112k 64k", image_format="qcow2")
    overlay = tmp_path / "overlay.qed"
    with front("-o", f"overlay={overlay}", image, tmp_path / "mnt") as mount:
        disk = os.open(tmp_path / "mnt" / "image.qcow2.raw", os.O_RDWR)
        os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_RANDOM)
        os.pwrite(disk, b"x" * 65536, 0)
        os.fsync(disk)
        os.kill(server_of(image), signal.SIGKILL)
        wait_until(lambda: not servers(tmp_path))
        for offset in (2 << 20, (2 << 20) + 65536):
            with pytest.raises(OSError, match="Input/output") as caught:
                os.pread(disk, 4096, offset)
            assert caught.value.errno == errno.EIO
        assert os.pread(disk, 4096, 0) == b"x" * 4096
        os.close(disk)
        mount.signal(signal.SIGTERM)
        code, log = mount.finish()
    assert code == 0
    lines = [line for line in log.splitlines() if "unmounted; the images are closed" not in line]
    assert len(lines) == 1, log
    assert "image.qcow2: qemu-nbd: ended by SIGKILL; reads that need QEMU fail" in log


def test_signals_to_the_whole_service(image: Path, tmp_path: Path) -> None:
    """A signal that systemd sends to all processes does not end qemu-nbd before the disk is closed.

    The disk is served until the last close, and reads that need QEMU succeed until then.
    """
    qemu.io(image, "write -c -P 8 2M 64k", "write -c -P 9 2112k 64k", image_format="qcow2")
    overlay = tmp_path / "overlay.qed"
    with front("-o", f"overlay={overlay}", image, tmp_path / "mnt") as mount:
        disk = os.open(tmp_path / "mnt" / "image.qcow2.raw", os.O_RDWR)
        server = server_of(image)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            for task in Path(f"/proc/{server}/task").iterdir():
                lines = (task / "status").read_text("ascii").splitlines()
                (mask,) = (line.split()[1] for line in lines if line.startswith("SigBlk:"))
                assert int(mask, 16) & 1 << number - 1, f"{task.name} takes signal {number}"
            os.kill(server, number)
        mount.signal(signal.SIGTERM)
        for offset, byte in ((2 << 20, b"\x08"), ((2 << 20) + 65536, b"\x09")):
            assert os.pread(disk, 4096, offset) == byte * 4096
        os.pwrite(disk, b"x", 2 << 20)  # needs the rest of the cluster
        os.fsync(disk)
        assert os.pread(disk, 2, 2 << 20) == b"x\x08"
        os.close(disk)
        code, _log = mount.finish()
    assert code == 0
    assert processes(tmp_path) == []


def test_mount_killed(image: Path, tmp_path: Path) -> None:
    """A mount that is killed leaves no program of QEMU behind, whatever it was doing."""
    with front("-r", image, tmp_path / "mnt") as mount:
        assert server_of(image)
        mount.signal(signal.SIGKILL)
        wait_until(lambda: not processes(tmp_path))


@pytest.mark.parametrize("milliseconds", [20, 60, 100, 150, 200])
def test_killed_while_starting(image: Path, tmp_path: Path, milliseconds: int) -> None:
    """A program that is killed while it opens an image leaves no program of QEMU behind."""
    script = (
        "import sys, qedfuse, os\n"
        "print('begun', flush=True)\n"
        "qedfuse.open(sys.argv[1])\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", script, str(image)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"begun\n"
        time.sleep(milliseconds / 1000)
        program.kill()
    wait_until(lambda: not processes(tmp_path))


def test_interrupt_from_terminal(image: Path, tmp_path: Path) -> None:
    """qemu-nbd is in a session of its own, so that Ctrl-C does not end it before the disk."""
    with qedfuse.open(image):
        assert os.getsid(server_of(image)) != os.getsid(0)
    assert processes(tmp_path) == []


def test_nothing_left(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is closed leaves no process, no descriptor and no file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with qedfuse.open(image) as disk:
        assert disk.read(4096) == b"\x07" * 4096
    assert processes(tmp_path) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not list((tmp_path / "temporary").iterdir())


def test_program_missing(image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without qemu-nbd the message names the package, and the exit code is 25."""
    monkeypatch.setenv("PATH", str(tmp_path))
    done = command("-r", image, tmp_path)
    assert done.returncode == 25
    assert done.stderr == (
        f"qedfuse: {image}: found no program qemu-nbd, expected it to be installed "
        "(package qemu-utils)\n"
    )


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'qemu-nbd: bad news' >&2; exit 1", "qemu-nbd: bad news"),
        ("printf 'a\\033[31mb\\n' >&2; exit 1", "qemu-nbd: a\\x1b[31mb"),
        # Programs of other versions: without an option, and with another protocol.
        (
            "echo \"qemu-nbd: unrecognized option '--shared=0'\" >&2; exit 1",
            "qemu-nbd: unrecognized option '--shared=0'",
        ),
        (
            """exec /usr/bin/perl -e 'open(L, "+<&=3"); accept C,L; syswrite C,0 x 99; sleep 9'""",
            "qemu-nbd: runs, but does not answer as an NBD server",
        ),
        ("exit 3", "qemu-nbd: ended with status 3"),
        ("kill -9 $$", "qemu-nbd: ended by SIGKILL"),
        ("head -c 10000000 /dev/zero >&2; exit 1", "qemu-nbd: "),
        ("exec /usr/bin/sleep 100", "found no answer for 1 s"),
    ],
)
def test_program_fails(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: str
) -> None:
    """Whatever a program of this name does, the error is one line, within a limited time."""
    program = tmp_path / "bin" / "qemu-nbd"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(process, "find_program", lambda *_names: str(program))
    monkeypatch.setattr(process, "READY_SECONDS", 1.0)
    with pytest.raises(ForeignError) as caught:
        qedfuse.open(image)
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "ended with status 3"),
        ("kill -9 $$", "ended by SIGKILL"),
        (
            """exec /usr/bin/perl -e 'open(L, "+<&=3"); accept C,L; syswrite C,0 x 99; sleep 9'""",
            "runs, but does not answer as an NBD server",
        ),
        (
            "echo \"qemu-nbd: unrecognized option '--shared=0'\" >&2; exit 1",
            "unrecognized option '--shared=0'",
        ),
        (None, "Unsupported qcow2 version 9"),  # the installed program refuses the image
    ],
)
def test_a_program_that_fails_gives_an_exit_code(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, reason: str
) -> None:
    """A mount, `convert` and `info` end with code 25 and one line, whatever QEMU has done."""
    if script is None:
        with image.open("r+b") as file:
            file.seek(4)
            file.write(bytes([0, 0, 0, 9]))
    else:
        program = tmp_path / "bin" / "qemu-nbd"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    message = f"{image}: qemu-nbd: {reason}\n"
    for done in (
        command("-r", image, tmp_path),
        run("qedimg", "convert", "-O", "raw", image, tmp_path / "copy.raw", timeout=60),
        run("qedimg", "info", "--backing-chain", image, timeout=60),
    ):
        assert (done.returncode, done.stdout) == (25, "")
        assert done.stderr in (f"qedfuse: {message}", f"qedimg: {message}")
    assert not (tmp_path / "copy.raw").exists()
    assert processes(tmp_path) == []


def test_in_use(image: Path) -> None:
    """An image that another program has locked for writing is in use; so is one of its bases.

    The message names the locked file and the process.
    """
    above = qemu.create(
        image.parent / "above.qcow2", image_format="qcow2", backing=image, backing_format="qcow2"
    )
    with qemu.hold(image, image_format="qcow2") as held:
        expected = (
            f'{image}: in use: Failed to get shared "write" lock, held by qemu-io (pid {held.pid})'
        )
        for path in (image, above):
            with pytest.raises(ImageInUseError) as caught:
                qedfuse.open(path)
            assert str(caught.value) == expected
            done = command("-r", path, image.parent)
            assert (done.returncode, done.stderr) == (16, f"qedfuse: {expected}\n")
    with qedfuse.open(above) as disk:
        assert disk.read(1) == b"\x07"


def test_in_use_by_a_program_that_has_ended(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the lock is gone when its holder is looked for, QEMU's own message is shown."""
    with qemu.hold(image, image_format="qcow2") as held:
        file = PosixFile.open(str(image))
        opened = opening.ForeignOpening(file, "qcow2", Limits(lambda _name, it: it))

        def lock_later(fd: int, mode: LockMode, name: str) -> None:
            held.command("close")
            lock_image(fd, mode, name)

        monkeypatch.setattr(opening, "lock_image", lock_later)
        with pytest.raises(
            ImageInUseError, match=r'in use: qemu-nbd: Failed to get shared "write"'
        ):
            opened.finish()
        opened.abandon()


def test_locked_while_open(image: Path) -> None:
    """While an image is read no other program can open it for writing."""
    with qedfuse.open(image), pytest.raises(qemu.QemuError, match="lock"):
        qemu.io(image, "write 0 512", image_format="qcow2")


async def test_cancelled_opening(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An opening that is cancelled ends its process, and does not wait for it."""
    stuck = image.parent / "qemu-nbd"
    stuck.write_text("#!/bin/sh\nexec /usr/bin/sleep 1000\n", "utf-8")
    stuck.chmod(0o755)
    monkeypatch.setattr(process, "find_program", lambda *_names: str(stuck))
    begin = time.monotonic()
    with trio.move_on_after(0.5) as scope:
        await open_foreign(PosixFile.open(str(image)), "qcow2", OpenOptions())
    assert scope.cancelled_caught
    assert time.monotonic() - begin < process.READY_SECONDS - 5


def test_abandoned_at_the_end(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An opening that is abandoned when the disk is just made closes each descriptor once."""
    made, abandoned = threading.Event(), threading.Event()

    def make(*arguments: Any) -> ForeignFile:  # noqa: ANN401  as for the class
        file = ForeignFile(*arguments)
        made.set()
        assert abandoned.wait(20)
        return file

    monkeypatch.setattr(opening, "ForeignFile", make)
    before = os.listdir("/proc/self/fd")  # noqa: PTH208  the names alone
    opened = opening.ForeignOpening(
        PosixFile.open(str(image)), "qcow2", Limits(lambda _name, file: file)
    )
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(opened.finish)
        assert made.wait(20)
        opened.abandon()
        abandoned.set()
        with pytest.raises(ForeignError, match="abandoned"):
            finished.result(20)
    assert processes(image.parent) == []
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208  the names alone


def test_abandoned_while_the_names_are_compared(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An opening that is abandoned while the images are read again keeps their files open."""
    real = Graph.refuse_changes
    used: list[bool] = []

    def abandon(chain: Graph) -> None:
        opened.abandon()
        used.extend(os.path.samestat(os.fstat(file.fd), image.stat()) for file in chain.files)
        real(chain)

    monkeypatch.setattr(Graph, "refuse_changes", abandon)
    before = os.listdir("/proc/self/fd")  # noqa: PTH208  the names alone
    opened = opening.ForeignOpening(
        PosixFile.open(str(image)), "qcow2", Limits(lambda _name, file: file)
    )
    with pytest.raises(ForeignError):  # the server has ended
        opened.finish()
    assert used == [True]
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208  the names alone


def test_abandoned_before_the_names_are_compared(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An opening that is abandoned when the server is ready reads no file that it has closed."""
    wait = process.QemuNbd.wait_ready
    read: list[Graph] = []

    def refuse(chain: Graph) -> None:
        read.append(chain)

    def abandon(server: process.QemuNbd) -> None:
        wait(server)
        opened.abandon()

    monkeypatch.setattr(process.QemuNbd, "wait_ready", abandon)
    monkeypatch.setattr(Graph, "refuse_changes", refuse)
    opened = opening.ForeignOpening(
        PosixFile.open(str(image)), "qcow2", Limits(lambda _name, file: file)
    )
    with pytest.raises(ForeignError, match="abandoned"):
        opened.finish()
    assert not read


def test_abandoned_after_the_end(image: Path) -> None:
    """An opening whose disk no task has taken is abandoned as a whole, also by a second call."""
    before = os.listdir("/proc/self/fd")  # noqa: PTH208  the names alone
    opened = opening.ForeignOpening(
        PosixFile.open(str(image)), "qcow2", Limits(lambda _name, file: file)
    )
    opened.finish()
    opened.abandon()
    opened.abandon()
    assert processes(image.parent) == []
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208  the names alone


def test_a_program_that_accepts_no_connection_delays_nothing_without_limit(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the queue for connections is full, another one fails; the others have no time limit."""
    program = tmp_path / "bin" / "qemu-nbd"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec /usr/bin/sleep 1000\n", "utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(process, "find_program", lambda *_names: str(program))
    monkeypatch.setattr(process, "READY_SECONDS", 0.1)
    limits = Limits(lambda name, _image: PosixFile.open(os.fsdecode(name)), lock=False)
    opened = opening.ForeignOpening(PosixFile.open(str(image)), "qcow2", limits)
    clients: list[socket.socket] = []
    with pytest.raises(BlockingIOError):
        clients.extend(opened._server.connect() for _ in range(process._BACKLOG + 2))
    assert clients
    for client in clients:
        assert not any(client.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16))
        client.close()
    opened.abandon()
    assert processes(image.parent) == []


@pytest.mark.parametrize("below", [False, True])
def test_changed_while_it_is_opened(
    image: Path, monkeypatch: pytest.MonkeyPatch, *, below: bool
) -> None:
    """An image that names another file when QEMU has read it than before is refused."""
    base = qemu.create(image.parent / "base.qcow2", 1 << 20, image_format="qcow2")
    top = qemu.create(
        image.parent / "top.qcow2", image_format="qcow2", backing=base, backing_format="qcow2"
    )
    changed = base if below else top
    wait = process.QemuNbd.wait_ready

    def change(server: process.QemuNbd) -> None:
        wait(server)
        arguments = ("-u", "-f", "qcow2", "-F", "raw", "-b", image, changed)
        qemu.run("qemu-img", "rebase", "-U", *arguments)

    def open_named(name: bytes, _image: PosixFile) -> PosixFile:
        return PosixFile.open(os.fsdecode(name))

    monkeypatch.setattr(process.QemuNbd, "wait_ready", change)
    limits = Limits(open_named, lock=False)
    opened = opening.ForeignOpening(PosixFile.open(str(top)), "qcow2", limits)
    with pytest.raises(ForeignError, match=f"{changed.name}: found other names of files"):
        opened.finish()
    opened.abandon()
    assert processes(image.parent) == []


def test_a_base_that_gets_a_header_while_it_is_opened(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base whose detected format has changed when QEMU has locked it is refused.

    Otherwise its header and tables would be shown as the content of a raw disk.
    """
    base = image.parent / "base.img"
    base.write_bytes(bytes(1 << 20))
    top = qemu.create(
        image.parent / "top.qcow2", image_format="qcow2", backing=base, backing_format="raw"
    )
    # Without a stated format, qedfuse and QEMU detect it.
    content = top.read_bytes()
    stated = content.index(bytes.fromhex("e2792aca"))
    top.write_bytes(content[:stated] + bytes.fromhex("6803f858") + content[stated + 4 :])

    def open_named(name: bytes, _image: PosixFile) -> PosixFile:
        return PosixFile.open(os.fsdecode(name))

    limits = Limits(open_named, lock=False)
    opened = opening.ForeignOpening(PosixFile.open(str(top)), "qcow2", limits)
    wait = process.QemuNbd.wait_ready

    def change(server: process.QemuNbd) -> None:
        wait(server)
        qemu.create(base, 1 << 20, image_format="qcow2")

    monkeypatch.setattr(process.QemuNbd, "wait_ready", change)
    with pytest.raises(ForeignError, match=f"{base.name}: found format qcow2, expected raw"):
        opened.finish()
    opened.abandon()
    assert processes(image.parent) == []


def test_closed_by_two_threads(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two threads that close the program, one closes its descriptors, and the other waits."""
    entered, released = threading.Event(), threading.Event()
    wait = process.QemuNbd._wait
    waits: list[float] = []

    def slow(server: process.QemuNbd, seconds: float) -> bool:
        waits.append(seconds)
        if len(waits) == 1:
            entered.set()
            assert released.wait(20)
        return wait(server, seconds)

    file = PosixFile.open(str(image))
    server = process.QemuNbd(open_graph(file, "qcow2", Limits(lambda _name, it: it)), "x")
    server.wait_ready()
    monkeypatch.setattr(process.QemuNbd, "_wait", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.close)
        assert entered.wait(20)
        second = pool.submit(server.close)
        # Without the lock the second ends now, and the first fails by closed descriptors.
        wait_for([second], 0.3)
        released.set()
        first.result(20)
        second.result(20)
    file.close()
    assert len(waits) == 1
    assert server.has_ended()


async def test_stopped_during_handshake(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of fetching ends reads on a qemu-nbd that hangs, also those that just connect."""
    disk = await open_foreign(PosixFile.open(str(image)), "qcow2", OpenOptions())
    server = server_of(image)
    os.kill(server, signal.SIGSTOP)
    wait_until(lambda: Path(f"/proc/{server}/stat").read_text().rpartition(") ")[2][0] == "T")
    connect = process.QemuNbd.connect
    made = threading.Event()

    def connect_and_tell(self: process.QemuNbd) -> socket.socket:
        client = connect(self)
        made.set()
        return client

    monkeypatch.setattr(process.QemuNbd, "connect", connect_and_tell)
    threads = [
        Thread(target=read_in_vain, args=(disk, offset), daemon=True) for offset in (0, 1 << 20)
    ]
    for thread in threads:
        thread.start()
    assert made.wait(20)
    disk.stop_fetching()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert "reads that need QEMU fail" not in caplog.text
    disk.close()


def read_in_vain(disk: HostFile, offset: int) -> None:
    """Read a page of a disk, which must fail."""
    with pytest.raises(HostError):
        disk.read_blocking(offset, memoryview(bytearray(4096)))


async def test_many_readers(tmp_path: Path) -> None:
    """Concurrent reads give the bytes of their ranges."""
    draw_bottom(tmp_path / "random.qcow2", "qcow2", random.Random(5))
    content = qemu.content(tmp_path / "random.qcow2", image_format="qcow2")
    async with open_disk(str(tmp_path / "random.qcow2")) as disk:

        async def read(offset: int) -> None:
            assert bytes(await disk.read(offset, 8192)) == content[offset : offset + 8192]

        async with trio.open_nursery() as nursery:
            for offset in range(0, DISK_BYTES, 96 * 1024):
                nursery.start_soon(read, offset)


def test_writable_mount(image: Path, tmp_path: Path) -> None:
    """A writable mount is refused, with what to do instead."""
    done = command(image, tmp_path)
    assert done.returncode == 1
    assert "which can only be read" in done.stderr
    assert done.stderr.count("\n") == 1


def test_name_in_header(image: Path, tmp_path: Path) -> None:
    """A name in a header needs an option, and a commit into such a base is refused."""
    path = qemu.create(tmp_path / "vm.qed", backing=image, backing_format="qcow2")
    (tmp_path / "mnt").mkdir()
    done = command("-r", path, tmp_path / "mnt")
    assert done.returncode == 17
    assert "foreign=qemu" in done.stderr
    for option in ("foreign=qemu", "backing_format=qcow2"):
        with (
            mounted(path, tmp_path / "mnt", "-o", option),
            (tmp_path / "mnt" / "vm.raw").open("r+b") as file,
        ):
            assert file.read(512) == b"\x07" * 512
            file.seek(1024)
            file.write(b"x" * 512)
    for words in (("vm.qed",), ("-b", "image.qcow2", "vm.qed")):
        code, _output, complaint = qedimg("commit", "--foreign", "qemu", *words, cwd=tmp_path)
        assert (code, complaint.count("\n")) == (1, 1)
        assert "which can only be read" in complaint
    qemu.io(path, "read -P 0x78 1024 512", "read -P 7 0 1024")


def test_sandbox_needs_no_package() -> None:
    """The script of the sandbox imports only Python's own modules, and one that does the same."""
    known = {"ctypes", "fcntl", "json", "os", "resource", "signal", "stat", "struct", "sys"}
    for module, others in (
        (sandbox, ["from qedfuse.util import landlock"]),
        (landlock, []),
    ):
        assert module.__file__ is not None
        lines = Path(module.__file__).read_text("utf-8").splitlines()
        assert {line.split()[1] for line in lines if line.startswith("import ")} <= known
        assert [line for line in lines if line.startswith("from qedfuse")] == others
