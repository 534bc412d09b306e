"""How a mount ends: unmounted, by signals, while in use, by force, by a kill."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
from typing import TYPE_CHECKING, NoReturn

import pytest

from qedfuse.errors import FuseError, HostError
from qedfuse.mount.commands import umount
from qedfuse.mount.commands.umount import UnmountFailedError, unmount_and_wait
from qedfuse.mount.system.boundedcall import call_in_child
from qedfuse.mount.system.unmount import unmount_by_fusermount
from tests.support import qemu
from tests.support.disks import has_need_check
from tests.support.mounted import (
    KEEPS_NEED_CHECK,
    clean_up,
    command_line,
    front,
    is_locked,
    is_mounted,
    mounted,
    qedfuse,
    refused,
)
from tests.support.sandbox import run_in_sandbox

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES = 8 << 20
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give an empty image of 8 MiB."""
    return qemu.create(tmp_path / "vm.qed", DISK_BYTES)


def put(disk: Path, data: bytes) -> None:
    """Write to the start of a disk."""
    with disk.open("r+b") as file:
        file.write(data)


def test_umount_ends_everything_cleanly(image: Path, tmp_path: Path) -> None:
    """After umount(8) the server exits with 0, NEED_CHECK is clear and the locks are released."""
    with front(image, tmp_path / "mnt") as mount:
        put(mount.mountpoint / "vm.raw", b"x" * 70000)
        assert is_locked(image)
        subprocess.run(["umount", mount.mountpoint], check=True)
        assert mount.finish()[0] == 0
    assert not has_need_check(image)
    assert not is_locked(image)
    assert qemu.check(image).code == 0
    assert qemu.content(image)[:70000] == b"x" * 70000


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_unmounts(image: Path, tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM, SIGINT and SIGHUP each unmount cleanly."""
    with front(image, tmp_path / "mnt") as mount:
        put(mount.mountpoint / "vm.raw", b"x" * 70000)
        mount.signal(number)
        code, log = mount.finish()
        assert code == 0, log
        assert not is_mounted(mount.mountpoint)
    assert not has_need_check(image)
    assert qemu.content(image)[:70000] == b"x" * 70000


def test_a_busy_mount_is_flushed_and_goes_on_until_the_last_close(
    image: Path, tmp_path: Path
) -> None:
    """A signal while a file is open makes everything durable; the last close ends the mount."""
    with front(image, tmp_path / "mnt") as mount:
        with (mount.mountpoint / "vm.raw").open("r+b", buffering=0) as disk:
            disk.write(b"x" * 70000)
            mount.signal(signal.SIGTERM)
            assert "still in use" in mount.read_line()
            # The data is flushed: the image file itself contains it.
            assert b"x" * 70000 in image.read_bytes()
            disk.seek(100)
            assert disk.write(b"y" * 100) == 100
        code, log = mount.finish()
        assert code == 0, log
    assert not has_need_check(image)
    assert qemu.content(image)[100:300] == b"y" * 100 + b"x" * 100


def test_a_detached_mount_in_use_is_flushed(image: Path, tmp_path: Path) -> None:
    """A signal after ``umount -l`` makes the disks durable that programs still have open."""
    with front(image, tmp_path / "mnt") as mount:
        with (mount.mountpoint / "vm.raw").open("r+b", buffering=0) as disk:
            subprocess.run(["umount", "-l", mount.mountpoint], check=True)
            disk.write(b"x" * 70000)
            mount.signal(signal.SIGTERM)
            assert "still in use: everything is durable now" in mount.read_line()
            assert b"x" * 70000 in image.read_bytes()
        assert mount.finish()[0] == 0
    assert not has_need_check(image)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EPERM, errno.ENOSYS])
def test_nothing_is_unmounted_if_the_process_cannot_be_waited_for(
    image: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unmount is refused, instead of reported as finished too early."""

    def fail(_pid: int) -> NoReturn:
        raise OSError(number, os.strerror(number))

    with front(image, tmp_path / "mnt") as mount:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pidfd_open", fail)
            with pytest.raises(UnmountFailedError) as caught:
                unmount_and_wait(str(mount.mountpoint))
        assert str(caught.value) == (
            f"{mount.mountpoint}: not unmounted: process {mount.process.pid}: cannot wait for "
            f"its end: {os.strerror(number)}"
        )
        assert is_mounted(mount.mountpoint)
        unmount_and_wait(str(mount.mountpoint))
        assert mount.finish()[0] == 0


def test_an_unreadable_record_is_no_success(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the record cannot be read after the end of the process, a failure is reported."""

    def fail(_path: Path, _user: int) -> NoReturn:
        msg = "/run/qedfuse/0:42.1: cannot read the mount record: Input/output error"
        raise HostError(msg)

    monkeypatch.setattr(umount, "take_record", fail)
    with front(image, tmp_path / "mnt") as mount:
        with pytest.raises(UnmountFailedError, match=r"process .* may have failed: /run/qedf"):
            unmount_and_wait(str(mount.mountpoint))
        assert mount.finish()[0] == 0


LAUNDERING_LOGGED = """
import sys
import qedfuse.mount.session
from qedfuse.mount.fuse.laundering import Laundering

launder = Laundering.launder

async def launder_and_log(self, exported):
    print("laundered:", await launder(self, exported), file=sys.stderr)
    return True

Laundering.launder = launder_and_log
"""


@pytest.mark.parametrize("option", ["rw", "truncate=zero"])
def test_dirty_pages_of_a_memory_map_are_durable_after_a_signal(
    image: Path, tmp_path: Path, option: str
) -> None:
    """A signal makes the kernel write the dirty pages of memory maps back, in every cache mode."""
    with front("-o", option, image, tmp_path / "mnt", prelude=LAUNDERING_LOGGED) as mount:
        disk = mount.mountpoint / "vm.raw"
        with disk.open("r+b") as file, mmap.mmap(file.fileno(), DISK_BYTES) as mapped:
            mapped[70000:70003] = b"new"
            mount.signal(signal.SIGTERM)
            assert mount.read_line() == "laundered: True\n"
            assert "still in use: everything is durable now" in mount.read_line()
            assert b"new" in image.read_bytes()
        assert mount.finish()[0] == 0


def test_a_busy_loop_device_goes_on_until_it_is_detached(image: Path, tmp_path: Path) -> None:
    """A signal while a loop device uses the disk ends the mount only after the detach."""
    with front(image, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "vm.raw"
        device = qemu.run("losetup", "--find", "--show", disk).stdout.strip()
        try:
            mount.signal(signal.SIGTERM)
            assert "still in use" in mount.read_line()
            qemu.run("mkfs.ext4", "-q", device)
            qemu.run("fsck.ext4", "-f", "-n", device)
        finally:
            qemu.run("losetup", "--detach", device)
        code, log = mount.finish()
        assert code == 0, log
    assert qemu.check(image).code == 0


def test_a_second_signal_ends_a_busy_mount_and_keeps_what_was_written(
    image: Path, tmp_path: Path
) -> None:
    """A second SIGTERM detaches the mount and still closes the image cleanly."""
    with front(image, tmp_path / "mnt") as mount:
        disk = os.open(mount.mountpoint / "vm.raw", os.O_RDWR)
        os.write(disk, b"x" * 70000)
        mount.signal(signal.SIGTERM)
        assert "still in use" in mount.read_line()
        mount.signal(signal.SIGTERM)
        code, log = mount.finish()
        assert code == 0, log
        assert "I/O errors" in log
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.close(disk)
        assert not is_mounted(mount.mountpoint)
    assert not has_need_check(image)
    assert qemu.content(image)[:70000] == b"x" * 70000


def test_the_end_of_a_login_session_does_not_force_a_busy_mount(
    image: Path, tmp_path: Path
) -> None:
    """SIGTERM and SIGHUP, which systemd sends together, leave an open disk usable."""
    with front(image, tmp_path / "mnt") as mount:
        with (mount.mountpoint / "vm.raw").open("r+b", buffering=0) as disk:
            mount.signal(signal.SIGTERM)
            assert "still in use" in mount.read_line()
            mount.signal(signal.SIGHUP)
            # After the second line the server has taken notice of the SIGHUP.
            for _ in range(2):
                mount.signal(signal.SIGUSR1)
                assert "open handles 1" in mount.read_line()
            assert disk.write(b"x" * 100) == 100
            os.fsync(disk)
        code, log = mount.finish()
        assert code == 0, log
    assert qemu.content(image)[:100] == b"x" * 100


HELD_FLUSH = """
import sys, threading
import qedfuse.mount.session  # before pyfuse3: the extension is loaded first
import pyfuse3
from qedfuse.mount import durability
from qedfuse.mount.process.unmounter import HelperUnmounter

flushing, closed = threading.Event(), threading.Event()
close, unmount = pyfuse3.close, HelperUnmounter.unmount

def hold(mountpoint):
    flushing.set()
    assert closed.wait(20)
    print("the flush returns", file=sys.stderr)

def unmount_later(mountpoint, **how):
    assert flushing.wait(20)
    unmount(mountpoint, **how)

def close_and_release(**how):
    close(**how)
    closed.set()

durability.sync_mount = hold
HelperUnmounter.unmount, pyfuse3.close = unmount_later, close_and_release
"""


def test_tasks_of_signals_end_before_the_session(image: Path, tmp_path: Path) -> None:
    """Tasks that signals started end before libfuse's session is closed."""
    with front(image, tmp_path / "mnt", prelude=HELD_FLUSH) as mount:
        put(mount.mountpoint / "vm.raw", b"x" * (4 << 20))
        mount.signal(signal.SIGTERM)
        mount.signal(signal.SIGINT)
        code, log = mount.finish()
        assert code == 0, log
        assert "the flush returns\n" in log
    assert not has_need_check(image)
    assert qemu.content(image)[: 4 << 20] == b"x" * (4 << 20)


LATE_SIGNALS = """
import atexit, logging, os, signal

class Late(logging.Handler):
    def emit(self, record):
        if "the images are closed" in record.getMessage():
            os.write(2, b"late\\n")
            signal.raise_signal(signal.{name})

logging.getLogger("qedfuse.mount.session").addHandler(Late())
logging.getLogger("qedfuse.mount.session").setLevel(logging.INFO)
atexit.register(lambda: (os.write(2, b"later\\n"), signal.raise_signal(signal.{name})))
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_after_the_end_changes_nothing(
    image: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A signal after the images are closed does not change the exit code 0."""
    prelude = LATE_SIGNALS.format(name=number.name)
    with front(image, tmp_path / "mnt", prelude=prelude) as mount:
        subprocess.run(["umount", mount.mountpoint], check=True)
        code, log = mount.finish()
        assert code == 0, log
        assert [line for line in log.split() if line.startswith("late")] == ["late", "later"]


def test_an_end_by_force_that_loses_data_is_a_failure(image: Path, tmp_path: Path) -> None:
    """An end by force before everything is durable exits with 2 and is logged."""
    prelude = (
        "import qedfuse.mount.session; from qedfuse.mount import shutdown\n"
        "shutdown._FORCED_SYNC_SECONDS = 0"
    )
    with front(image, tmp_path / "mnt", prelude=prelude) as mount:
        disk = os.open(mount.mountpoint / "vm.raw", os.O_RDWR)
        os.write(disk, b"x" * 70000)
        mount.signal(signal.SIGTERM)
        assert "still in use" in mount.read_line()
        mount.signal(signal.SIGTERM)
        code, log = mount.finish()
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            os.close(disk)
        assert code == 2, log
        assert f"{mount.mountpoint}: ended by force before everything was durable\n" in log
        assert not is_mounted(mount.mountpoint)
    assert qemu.check(image).code == 0


def test_a_working_directory_delays_the_end(image: Path, tmp_path: Path) -> None:
    """A process whose working directory is the mount delays its end until it leaves."""
    with front(image, tmp_path / "mnt") as mount:
        with subprocess.Popen(["cat"], cwd=mount.mountpoint, stdin=subprocess.PIPE) as guest:
            mount.signal(signal.SIGTERM)
            assert "still in use" in mount.read_line()
            guest.communicate()
        assert mount.finish()[0] == 0


def test_a_killed_process_leaves_a_dead_mountpoint(image: Path, tmp_path: Path) -> None:
    """After SIGKILL the mountpoint is dead instead of empty, and both commands explain it."""
    with front(image, tmp_path / "mnt", prelude=KEEPS_NEED_CHECK) as mount:
        with (mount.mountpoint / "vm.raw").open("r+b", buffering=0) as disk:
            disk.write(b"x" * 70000)
            os.fsync(disk.fileno())
        mount.signal(signal.SIGKILL)
        assert mount.finish()[0] == -signal.SIGKILL
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            list(mount.mountpoint.iterdir())
        line = refused(image, mount.mountpoint, code=18)
        assert "stale" in line
        assert "fusermount3 -u" in line
        done = qedfuse("umount", mount.mountpoint)
        assert done.returncode == 32
        assert "without closing the images cleanly" in done.stderr
        assert not is_mounted(mount.mountpoint)
    assert has_need_check(image)
    assert qemu.content(image)[:70000] == b"x" * 70000


def test_another_mount_keeps_the_record_of_a_killed_process(image: Path, tmp_path: Path) -> None:
    """Qedfuse umount reports a killed process also after another mount has started."""
    with front(image, tmp_path / "mnt") as mount:
        mount.signal(signal.SIGKILL)
        assert mount.finish()[0] == -signal.SIGKILL
        other = qemu.create(tmp_path / "other.qed", 1 << 20)
        with mounted(other, tmp_path / "other"):
            pass
        line = refused("umount", mount.mountpoint, code=32)
        assert "without closing the images cleanly" in line
        assert not is_mounted(mount.mountpoint)


def test_umount_of_a_busy_mount_is_refused(image: Path, tmp_path: Path) -> None:
    """The command refuses to unmount a mount in use with code 18, and changes nothing."""
    with mounted(image, tmp_path / "mnt") as directory, (directory / "vm.raw").open("rb"):
        done = qedfuse("umount", directory)
        assert done.returncode == 18
        assert "in use" in done.stderr
        assert is_mounted(directory)


def test_umount_refuses_other_file_systems(tmp_path: Path) -> None:
    """The command refuses to unmount a plain directory and another file system."""
    assert "found no mount" in refused("umount", tmp_path, code=18)
    assert "expected fuse.qedfuse" in refused("umount", "/proc", code=18)


def test_a_caller_that_ignores_sigchld(image: Path, tmp_path: Path) -> None:
    """The exit codes are the same if the caller ignores SIGCHLD, which a program inherits."""

    def run(*words: str | Path) -> int:
        script = ("env", "--ignore-signal=CHLD")
        return subprocess.run(
            [*script, *command_line(""), *words], stderr=subprocess.DEVNULL, check=False
        ).returncode

    directory, bad = tmp_path / "mnt", tmp_path / "bad"
    directory.mkdir()
    bad.write_bytes(b"no image")
    codes = [run(bad, directory), qedfuse(bad, directory).returncode]
    assert codes[0] == codes[1] > 0
    try:
        assert run(image, directory) == 0
        assert run("stats", directory) == 0
        assert run("umount", directory) == 0
    finally:
        clean_up(directory)


def test_umount_returns_when_the_process_is_gone(image: Path, tmp_path: Path) -> None:
    """When qedfuse umount has returned, QEMU can open the image for writing."""
    for number in range(5):
        with mounted(image, tmp_path / "mnt") as directory:
            put(directory / "vm.raw", bytes([number]) * 200000)
        qemu.io(image, f"read -P {number} 0 200000", f"write -P {number} 1M 64k")


def test_a_mountpoint_called_busy_is_not_taken_for_busy(tmp_path: Path) -> None:
    """A mountpoint whose name contains "busy" is not taken for a busy mount."""
    mountpoint = tmp_path / "busy\u2028not permitted"
    mountpoint.mkdir()
    with pytest.raises(FuseError) as caught:
        unmount_by_fusermount(str(mountpoint), lazy=False)
    assert type(caught.value) is FuseError
    assert "busy\\u2028not permitted" in str(caught.value)


def test_a_stopped_server_is_not_waited_for_without_limit(image: Path, installation: Path) -> None:
    """A remount returns although the server is stopped, and umount with a timeout fails in time."""
    shown = run_in_sandbox(
        """
        export PATH="$2/bin:$PATH"
        mkdir /srv/disk
        ln -s disk /srv/link
        qedfuse --pidfile /run/pid "$1" /srv/disk
        server=$(cat /run/pid)
        kill -STOP "$server"
        # The watchdog lets the process go on, and the unmount succeed.
        (sleep 20; kill -CONT "$server") & watchdog=$!
        ln -s qedfuse "$2/bin/mount.qedfuse"
        mount.qedfuse none /srv/link -f -o remount,ro
        code=0
        qedfuse umount /srv/link --timeout 0.2 2>&1 || code=$?
        kill "$watchdog"
        echo "$code $server"
        kill -CONT "$server"
        tail --pid "$server" -f /dev/null & tail=$!
        qedfuse umount /srv/disk 2>/dev/null || true
        wait "$tail"
        """,
        image,
        installation,
    )
    line, outcome = shown.splitlines()
    code, server = outcome.split()
    assert code == "32"
    assert f"process {server} " in line
    assert line.startswith("qedfuse: /srv/disk: ")
    assert line.endswith(" (waited 0.2 s)")
    assert not has_need_check(image)


def test_a_call_in_a_child_has_a_timeout() -> None:
    """A call in a child returns or raises what the child did, or raises TimeoutError."""
    assert call_in_child(lambda: ("result", 1), None) == ("result", 1)
    with pytest.raises(UnmountFailedError) as caught:
        call_in_child(_fail, 30)
    assert (str(caught.value), caught.value.exit_code) == ("it failed", 16)
    with pytest.raises(FileNotFoundError):
        call_in_child(lambda: os.stat("/proc/nonexistent"), None)  # noqa: PTH116
    with pytest.raises(TimeoutError):
        call_in_child(signal.pause, 0.01)


def _fail() -> NoReturn:
    """Raise an error that has attributes of its own."""
    message = "it failed"
    raise UnmountFailedError(message, 16)
