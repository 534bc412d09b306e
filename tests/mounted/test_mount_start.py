"""How a mount begins: background, refusals, several images, overlays, mount(8), ordinary users."""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.mount.system.mounttable import FUSE_TYPE, find_mount
from tests.support import qemu
from tests.support.directorylock import locked
from tests.support.mounted import (
    COMMAND,
    IO_FLUSHER,
    TIMEOUT,
    UNPROTECTED,
    FrontMount,
    clean_up,
    front,
    io_flusher_flags,
    is_locked,
    is_mounted,
    may_be_io_flusher,
    mounted,
    qedfuse,
    refused,
)
from tests.support.programs import environment
from tests.support.sandbox import PROGRAMS
from tests.support.users import AS_USER, DEVICE, USER_ID, as_user, user_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

DISK_BYTES = 4 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give an image whose first cluster is filled with 7."""
    path = qemu.create(tmp_path / "vm.qed", DISK_BYTES)
    qemu.io(path, "write -P 7 0 64k")
    return path


def put(disk: Path, data: bytes, start: int = 0) -> None:
    """Write to a disk."""
    with disk.open("r+b") as file:
        file.seek(start)
        file.write(data)


def names(directory: Path) -> list[str]:
    """List a directory."""
    return [path.name for path in directory.iterdir()]


# In the background


def test_the_server_is_forked_from_a_single_thread(image: Path, mnt: Path) -> None:
    """The command forks while it has one thread: no lock can stay held in the child."""
    script = (
        "import os, sys\n"
        "fork = os.fork\n"
        "def count_and_fork():\n"
        "    print(len(os.listdir('/proc/self/task')), flush=True)\n"
        "    return fork()\n"
        "os.fork = count_and_fork\n"
        "from qedfuse.cli.qedfuse.main import main\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, image, mnt],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert set(done.stdout.split()) == {"1"}
    # Python 3.12 and later warn of a fork beside threads.
    assert "multi-threaded" not in done.stderr
    assert is_mounted(mnt)


def test_the_command_returns_when_the_disk_is_ready(image: Path, mnt: Path, tmp_path: Path) -> None:
    """The server has its own session, the root as its directory, and /dev/null as its streams."""
    pidfile = tmp_path / "pid"
    with mounted(image, mnt, "--pidfile", pidfile) as directory:
        assert names(directory) == ["vm.raw"]
        pid = int(pidfile.read_text())
        assert os.getsid(pid) == pid
        proc = Path(f"/proc/{pid}")
        assert (proc / "cwd").readlink() == Path("/")
        assert {str((proc / "fd" / str(fd)).readlink()) for fd in range(3)} == {"/dev/null"}
    assert not pidfile.exists()


def test_relative_paths_begin_at_the_working_directory(image: Path, mnt: Path) -> None:
    """Relative source, mountpoint, pid file and overlay begin at the command's directory."""
    words = ("vm.qed", "mnt", "--pidfile", "pid", "-o", "overlay=top.qed")
    done = qedfuse(*words, cwd=image.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert (image.parent / "pid").exists()
    assert (image.parent / "top.qed").exists()
    assert qedfuse("umount", "mnt", cwd=image.parent).returncode == 0
    assert not is_mounted(mnt)


def test_the_mount_table_shows_source_and_type(tmp_path: Path, mnt: Path) -> None:
    """The mount table shows source and type, also for names with commas, blanks and backslashes."""
    odd = qemu.create(tmp_path / "a,b c\\d.qed", DISK_BYTES)
    with mounted(odd, mnt) as directory:
        words = ("findmnt", "-no", "SOURCE,FSTYPE,OPTIONS", "-r", str(directory))
        found = qemu.run(*words).stdout.encode().decode("unicode_escape").strip()
        assert found.startswith(f"{odd} {FUSE_TYPE} rw,nosuid,nodev")
        assert names(directory) == ["a,b c\\d.raw"]


def test_names_that_are_not_utf8(tmp_path: Path, mnt: Path) -> None:
    """An image whose name is not UTF-8 is shown under the same bytes."""
    name = os.fsdecode(b"\xff\xfe.qed")
    image = qemu.create(tmp_path / "x.qed", DISK_BYTES).rename(tmp_path / name)
    with mounted(image, mnt) as directory:
        assert [os.fsencode(path.name) for path in directory.iterdir()] == [b"\xff\xfe.raw"]


def test_systemd_is_notified(image: Path, mnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service manager gets READY=1 when the disk is ready and STOPPING=1 after the unmount."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0qedfuse-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@qedfuse-test-{os.getpid()}")
        manager.settimeout(30)
        with mounted(image, mnt):
            assert manager.recv(100) == b"READY=1"
        assert manager.recv(100) == b"STOPPING=1"


def test_debug_shows_requests(image: Path, mnt: Path) -> None:
    """-d stays in the foreground and prints the kernel's requests."""
    with front("-d", image, mnt) as mount:
        assert names(mnt) == ["vm.raw"]
        subprocess.run(["umount", mnt], check=True)
        code, log = mount.finish()
    assert code == 0
    assert "qedfuse: opendir(1,)" in log


@pytest.mark.parametrize(
    ("option", "found"),
    [("rw", 512), ("readahead=256K", 256), ("readahead=64K", 64), ("readahead=0", 0),
     ("readahead=kernel", 128)],
)  # fmt: skip
def test_read_ahead(image: Path, mnt: Path, option: str, found: int) -> None:
    """The kernel reads ahead as far as the option says by the time the command returns."""
    with mounted(image, mnt, "-o", option) as directory:
        assert read_ahead(directory) == found
        assert (directory / "vm.raw").read_bytes() == b"\7" * 65536 + bytes(DISK_BYTES - 65536)


def read_ahead(mountpoint: Path) -> int:
    """Ask the kernel how far it reads ahead on a mount, in KiB."""
    entry = find_mount(str(mountpoint))
    assert entry is not None
    return int(Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").read_text())


ANY_NAME = "a b\u2028\u2029\x85\x0c\x0b\x1c\x1d\x1e\r\t\n\\134#, é" + os.fsdecode(b"\xff")
"""Line ends of Python, characters that the mount table escapes, and bytes that are not UTF-8."""


def test_any_name_can_be_a_mountpoint(image: Path, tmp_path: Path) -> None:
    """A mountpoint of any name is found again in the mount table."""
    with mounted(image, tmp_path / ANY_NAME) as directory:
        assert (directory / "vm.raw").stat().st_size == DISK_BYTES
        assert "in use" in refused(image, directory, code=18)


# Refused


def test_refusals_before_the_mount_leave_no_trace(image: Path, mnt: Path, tmp_path: Path) -> None:
    """A refused mount prints one line, has the documented exit code, and changes nothing."""
    before = image.read_bytes()
    text = tmp_path / "text"
    text.write_text("no image" * 100)
    assert "none.qed" in refused(tmp_path / "none.qed", mnt, code=2)
    assert str(text) in refused(text, mnt, code=12)
    assert "expected a regular file" in refused("/dev/null", mnt, code=12)
    assert "found nothing" in refused(image, tmp_path / "none", code=18)
    assert "found no QED image" in refused("/proc/self/fdinfo", mnt, code=12)
    assert "unknown" in refused(image, mnt, "-o", "frob", code=1)
    assert "cannot write the pid file" in refused(image, mnt, "--pidfile", "/proc/x/y", code=2)
    assert "taken by" in refused(image, image, mnt, code=18)
    (tmp_path / "file").touch()
    other = qemu.create(tmp_path / "other.qed", DISK_BYTES)
    assert "expected a directory" in refused(image, other, tmp_path / "file", code=18)
    assert "found 2 images" in refused(image, other, mnt, "-o", "overlay=/x", code=1)
    assert not is_mounted(mnt)
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    "failure",
    [
        # libfuse mounts between the first and the second call.
        "calls = iter([set, fail]); attach._fuse_descriptors = lambda: next(calls)()",
        "serving.find_new_mount = fail",
        "serving.set_readahead = fail",
    ],
)
def test_a_failure_right_after_the_mount_unmounts(image: Path, mnt: Path, failure: str) -> None:
    """A failure right after the mount leaves no dead mountpoint and no lock."""
    prelude = f"""
import os
from qedfuse.mount import serving
from qedfuse.mount.fuse import attach

def fail(*args):
    os.write(1, b"reached")
    raise OSError(24, "Too many open files")

{failure}
"""
    done = qedfuse(image, mnt, prelude=prelude)
    assert done.stdout == "reached"
    assert done.returncode == 2, done
    assert not is_mounted(mnt)
    assert not is_locked(image)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_a_command_killed_before_it_returns_leaves_no_mount(
    image: Path, mnt: Path, tmp_path: Path, name: str
) -> None:
    """A command ended by a signal before it returns, as by timeout(1), leaves no mount."""
    prelude = f"""
import os, select, signal
from qedfuse.mount.process import daemon
discard = daemon.discard_standard_streams

def signal_the_command():
    parent = os.pidfd_open(os.getppid())
    os.write(1, b"%d" % os.getpid())
    os.kill(os.getppid(), signal.{name})
    if signal.{name} == signal.SIGKILL:
        select.select([parent], [], [])
    discard()

daemon.discard_standard_streams = signal_the_command
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
    pidfile = tmp_path / "pid"
    # In a sandbox the server itself could not send the signal.
    words = ("-o", "sandbox=off", "--pidfile", pidfile)
    done = qedfuse(image, mnt, *words, prelude=prelude)
    assert done.returncode == (-9 if name == "SIGKILL" else 130)
    with suppress(ProcessLookupError):
        server = os.pidfd_open(int(done.stdout))
        assert select.select([server], [], [], TIMEOUT)[0]
        os.close(server)
    assert not is_mounted(mnt)
    assert not is_locked(image)
    assert not pidfile.exists()


def test_a_fifo_as_pid_file_without_a_reader_is_refused(
    image: Path, mnt: Path, tmp_path: Path
) -> None:
    """A pid file that is a FIFO without a reader is refused instead of waited for."""
    os.mkfifo(tmp_path / "fifo")
    line = refused(image, mnt, "--pidfile", tmp_path / "fifo", code=2)
    assert "found a FIFO without a reader" in line
    assert not is_mounted(mnt)


def test_a_mountpoint_in_use_is_refused(image: Path, mnt: Path, tmp_path: Path) -> None:
    """A mountpoint in use is refused with the command that unmounts it."""
    other = qemu.create(tmp_path / "other.qed", DISK_BYTES)
    with mounted(image, mnt):
        assert f"qedfuse umount {mnt}" in refused(other, mnt, code=18)


@pytest.mark.parametrize("kind", ["qed", "qcow2", "vmdk"])
def test_a_forgotten_mountpoint(image: Path, tmp_path: Path, kind: str) -> None:
    """An image as the last word is refused and unchanged; ``nonempty`` allows it."""
    other = qemu.create(tmp_path / "other", DISK_BYTES, image_format=kind)
    before = other.read_bytes()
    line = refused(image, other, code=18)
    shown = {"qed": "QED", "vmdk": "VMDK"}.get(kind, kind)
    assert line.endswith(
        f"mountpoint {other}: found a {shown} image, expected a directory or another file (the "
        "last word is the mountpoint: qedfuse IMAGE... MOUNTPOINT; or add -o nonempty)"
    )
    with mounted(image, other, "-o", "nonempty") as disk:
        assert disk.stat().st_size == DISK_BYTES
    assert other.read_bytes() == before


@pytest.mark.parametrize("source", ["directory", "file"])
def test_words_in_the_wrong_order(image: Path, tmp_path: Path, source: str) -> None:
    """If the mountpoint comes first, the message has the right order."""
    place = tmp_path / "place"
    if source == "file":
        place.touch()
    else:
        place.mkdir()
        (place / "notes.txt").write_text("no image")
    line = refused(place, image, code=18)
    assert line.endswith(f"(the image comes first: qedfuse {image} {place})")
    assert not is_mounted(image)


def test_an_image_under_its_own_disk(image: Path) -> None:
    """An image may be the mountpoint of its own disk, as with QEMU."""
    length = image.stat().st_size
    with mounted(image, image) as disk:
        assert disk.stat().st_size == DISK_BYTES != length
    assert image.stat().st_size == length


@pytest.mark.parametrize("words", [("{image}", ""), ("", "{mnt}"), ("umount", ""), ("stats", "")])
def test_an_empty_name(image: Path, mnt: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """An empty name, as of a variable that is not set, does not stand for the current directory."""
    line = refused(*(word.format(image=image, mnt=mnt) for word in words), code=1)
    assert "found '', expected a path" in line
    assert not is_mounted(mnt)
    assert not is_mounted(tmp_path)


def test_an_image_in_use_by_qemu_is_refused(image: Path, mnt: Path) -> None:
    """An image that QEMU writes is refused with its pid; sharing rules are those of QEMU."""
    with qemu.hold(image) as holder:
        line = refused(image, mnt, code=16)
        assert f"pid {holder.pid}" in line
        assert "in use" in refused(image, mnt, "-o", "ro", code=16)
        with mounted(image, mnt, "-o", "force_share") as directory:
            assert (directory / "vm.raw").read_bytes()[:4] == b"\7" * 4
    with qemu.hold(image, read_only=True), mounted(image, mnt, "-o", "ro"):
        pass
    with mounted(image, mnt), pytest.raises(qemu.QemuError, match="lock"):
        qemu.io(image, "read 0 64k")


def test_a_refusal_in_the_foreground_is_the_same(tmp_path: Path, mnt: Path) -> None:
    """-f prints the same refusal as a mount in the background."""
    assert "none.qed" in refused(tmp_path / "none.qed", mnt, "-f", code=2)


# Several images, overlays


def test_two_images_and_a_directory_of_images(image: Path, mnt: Path, tmp_path: Path) -> None:
    """Each image is a file of the mount, and writes go to the right image."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.qed", "b.img"):
        qemu.create(images / name, DISK_BYTES)
    done = qedfuse(image, images, mnt)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(names(mnt)) == ["a.raw", "b.img.raw", "vm.raw"]
    put(mnt / "b.img.raw", b"bbbb", 12345)
    put(mnt / "a.raw", b"aaaa", 12345)
    assert qedfuse("umount", mnt).returncode == 0
    assert qemu.content(images / "b.img")[12340:12350] == b"\0" * 5 + b"bbbb" + b"\0"
    assert qemu.content(images / "a.qed")[12345:12349] == b"aaaa"
    assert qemu.content(image) == b"\7" * 65536 + bytes(DISK_BYTES - 65536)


def test_snapshot_drops_all_writes(image: Path, mnt: Path, tmp_path: Path) -> None:
    """With snapshot the source does not change and no file is left in TMPDIR."""
    image.chmod(0o400)
    before = image.read_bytes()
    (tmp_path / "tmp").mkdir()
    os.environ["TMPDIR"] = str(tmp_path / "tmp")
    try:
        with mounted(image, mnt, "-o", "snapshot") as directory:
            put(directory / "vm.raw", b"new" * 100, 100)
            assert (directory / "vm.raw").read_bytes()[99:106] == b"\7newnew"
            assert names(tmp_path / "tmp") == []
            assert os.statvfs(directory).f_blocks > 0
    finally:
        del os.environ["TMPDIR"]
    assert image.read_bytes() == before


def test_overlay_takes_all_writes(image: Path, mnt: Path, tmp_path: Path) -> None:
    """An overlay is created if missing, reused, and read by QEMU with its base."""
    before = image.read_bytes()
    (tmp_path / "elsewhere").mkdir()
    overlay = tmp_path / "elsewhere" / "top.qed"
    for data in (b"one", b"two"):
        with mounted(image, mnt, "-o", f"overlay={overlay}") as directory:
            put(directory / "vm.raw", data, 100 if data == b"one" else 200)
    assert image.read_bytes() == before
    content = qemu.content(overlay)
    assert content[100:103] == b"one"
    assert content[200:203] == b"two"
    assert content[:100] == b"\7" * 100
    assert qemu.check(overlay).code == 0


def test_an_overlay_of_another_source_is_refused(image: Path, mnt: Path, tmp_path: Path) -> None:
    """An overlay of another source is refused with a line that names both."""
    other = qemu.create(tmp_path / "other.qed", DISK_BYTES)
    overlay = qemu.create(tmp_path / "top.qed", backing=other)
    line = refused(image, mnt, "-o", f"overlay={overlay}", code=1)
    assert str(other) in line
    assert str(image) in line
    assert "found no backing file" in refused(image, mnt, "-o", f"overlay={other}", code=1)


# Images that were not closed cleanly


def test_leaks_are_logged_and_the_mount_goes_on(image: Path, mnt: Path) -> None:
    """Leaks of an image that was not closed cleanly are a warning before the command returns."""
    with image.open("r+b") as file:
        set_need_check(image)
        file.seek(0, os.SEEK_END)
        file.write(bytes(65536))
    done = qedfuse(image, mnt)
    assert done.returncode == 0
    assert "leaked cluster" in done.stderr
    assert qedfuse("umount", mnt).returncode == 0
    assert image.read_bytes()[16] & 2 == 0


def set_need_check(image: Path) -> None:
    """Set NEED_CHECK in the header."""
    with image.open("r+b") as file:
        file.seek(16)
        file.write(b"\2")


def test_errors_of_an_unclean_image_refuse_a_writable_mount(image: Path, mnt: Path) -> None:
    """An unclean image with errors is mounted only read-only, and the message says what to do."""
    set_need_check(image)
    with image.open("r+b") as file:
        # The second entry of the L2 table, which the first of the L1 table refers to.
        file.seek(65536)
        file.seek(int.from_bytes(file.read(8), "little") + 8)
        file.write((1 << 40).to_bytes(8, "little"))
    before = image.read_bytes()
    line = refused(image, mnt, code=13)
    for words in (str(image), "1 error", "nothing has been changed", "-o ro", "check -r all"):
        assert words in line
    with mounted(image, mnt, "-o", "ro") as directory, (directory / "vm.raw").open("rb") as disk:
        assert disk.read(65536) == b"\7" * 65536
    assert image.read_bytes() == before


# mount(8) and ordinary users


@contextmanager
def linked(*names: str) -> Iterator[None]:
    """Put the command where mount(8) finds it, under each name."""
    with ExitStack() as stack:
        # No sandbox may copy these directories meanwhile.
        for directory in PROGRAMS:
            stack.enter_context(locked(directory))
        for name in names:
            path = Path(name)
            if path.exists():
                pytest.skip(f"{name} is there already")
            path.write_text(
                f"#!/bin/bash\nexport PYTHONPATH={environment()['PYTHONPATH']}\n"
                f"exec {sys.executable} -c 'import sys; from qedfuse.cli.qedfuse.main import main; "
                f'sys.argv[0] = "{name}"; sys.exit(main())\' "$@"\n'
            )
            stack.callback(path.unlink)
            path.chmod(0o755)
        yield


def test_mount_by_type(image: Path, mnt: Path) -> None:
    """The type fuse.qedfuse makes mount(8) run the command with its options; umount ends it."""
    with linked("/usr/local/bin/qedfuse"):
        qemu.run("mount", "-t", "fuse.qedfuse", image, mnt, "-o", "ro,noatime,x-a=b,umask=022")
        assert is_mounted(mnt)
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            put(mnt / "vm.raw", b"x")
        assert qedfuse("umount", mnt).returncode == 0
        with pytest.raises(qemu.QemuError, match="unknown"):
            qemu.run("mount", "-t", "fuse.qedfuse", image, mnt, "-o", "frob")
        assert not is_mounted(mnt)


def test_mount_helper_and_fstab(image: Path, mnt: Path, tmp_path: Path) -> None:
    """The type qedfuse and a line of fstab work where the helper is installed; -f is a dry run."""
    with linked("/sbin/mount.qedfuse"):
        table = tmp_path / "fstab"
        table.write_text(f"{image} {mnt} qedfuse rw,noauto,nofail,_netdev,user 0 0\n")
        qemu.run("mount", "-T", table, "-f", mnt)
        assert not is_mounted(mnt)
        qemu.run("mount", "-T", table, mnt)
        put(mnt / "vm.raw", b"x")
        assert qedfuse("umount", mnt).returncode == 0
        qemu.run("mount", "-t", "qedfuse", "-r", "-n", image, mnt)
        assert (mnt / "vm.raw").read_bytes()[0] == ord("x")
        assert qedfuse("umount", mnt).returncode == 0


@pytest.fixture(name="user_directory")
def _user_directory() -> Iterator[Path]:
    """Give a directory of an ordinary user with an image, who may use the FUSE device meanwhile."""
    with user_directory() as path:
        qemu.create(path / "vm.qed", DISK_BYTES)
        os.chown(path / "vm.qed", USER_ID, USER_ID)
        yield path


def test_an_ordinary_user_mounts_any_name(user_directory: Path) -> None:
    """fusermount3 and the kernel get any name of image and mountpoint unchanged."""
    image = (user_directory / "vm.qed").rename(user_directory / f"{ANY_NAME}.qed")
    mnt = user_directory / "mnt" / ANY_NAME
    mnt.mkdir()
    os.chown(mnt, USER_ID, USER_ID)
    try:
        done = as_user(*COMMAND, image, mnt)
        assert (done.returncode, done.stderr) == (0, "")
        entry = find_mount(str(mnt))
        assert entry is not None
        assert entry.source == str(image)
        # Root may not read the mount of another user.
        assert "in use: found another qedfuse mount" in refused(image, mnt, code=18)
        done = as_user(*COMMAND, "umount", mnt)
        assert (done.returncode, done.stderr) == (0, "")
    finally:
        clean_up(mnt)


def test_an_ordinary_user_mounts_and_unmounts(user_directory: Path) -> None:
    """An ordinary user mounts through fusermount3, and the user or root unmounts."""
    image, mnt = user_directory / "vm.qed", user_directory / "mnt"
    done = as_user(*COMMAND, image, mnt)
    assert (done.returncode, done.stderr) == (0, "")
    done = as_user(
        "dd", "if=/dev/zero", f"of={mnt}/vm.raw", "bs=1M", "count=1", "conv=notrunc", "status=none"
    )
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(PermissionError):
        list(mnt.iterdir())
    done = as_user(*COMMAND, "umount", mnt)
    assert (done.returncode, done.stderr) == (0, "")
    assert as_user(*COMMAND, image, mnt).returncode == 0
    assert qedfuse("umount", mnt).returncode == 0
    assert qemu.check(image).code == 0


def test_a_user_cannot_unmount_the_mount_of_another_user(user_directory: Path, image: Path) -> None:
    """``qedfuse umount`` names both users, and the mount of root goes on."""
    mnt = user_directory / "mnt"
    assert qedfuse(image, mnt).returncode == 0
    try:
        done = as_user(*COMMAND, "umount", mnt)
        assert done.stderr == (
            f"qedfuse: {mnt}: found a mount of user 0, expected one of user {USER_ID} "
            "(only its owner and root can unmount it)\n"
        )
        assert done.returncode == 19
        assert find_mount(str(mnt)) is not None
    finally:
        assert qedfuse("umount", mnt).returncode == 0


INHERITED: Final = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
os.setresuid(65534, 65534, 65534)
for _ in range(2):
    assert os.pwrite(fd, b"x" * 4096, 0) == 4096
    os.fsync(fd)
assert os.lseek(fd, 0, os.SEEK_DATA) == 0
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_allow_root_serves_a_process_that_drops_its_privileges(image: Path, tmp_path: Path) -> None:
    """A disk that root has opened can be written, flushed and searched by another user then."""
    with mounted(image, tmp_path / "mnt", "-o", "allow_root") as directory:
        subprocess.run([sys.executable, "-c", INHERITED, directory / "vm.raw"], check=True)


def test_missing_permissions_are_explained(user_directory: Path) -> None:
    """allow_other, the FUSE device and others' images each have a message and an exit code."""
    own, mnt = user_directory / "vm.qed", user_directory / "mnt"
    for option in ("allow_other", "allow_root"):
        done = as_user(*COMMAND, own, mnt, "-o", option)
        assert done.returncode == 19
        assert "user_allow_other" in done.stderr
    DEVICE.chmod(0o600)
    done = as_user(*COMMAND, own, mnt)
    assert done.returncode == 19
    assert "/dev/fuse" in done.stderr
    DEVICE.chmod(0o666)
    own.chmod(0o444)
    os.chown(own, 0, 0)
    done = as_user(*COMMAND, own, mnt)
    assert done.returncode == 2
    assert "-o ro" in done.stderr
    done = as_user(*COMMAND, own, mnt, "-o", "ro")
    assert (done.returncode, done.stderr) == (0, "")
    assert as_user(*COMMAND, "umount", mnt).returncode == 0
    done = as_user("setpriv", "--no-new-privs", *COMMAND, own, mnt, "-o", "ro")
    assert done.returncode == 19
    assert "fusermount3: mount failed: Operation not permitted (no_new_privs is set" in done.stderr


def test_an_ordinary_user_sees_that_read_ahead_stays_short(user_directory: Path) -> None:
    """A read-ahead that only root may set is logged once, and printed if it was asked for."""
    image, mnt = user_directory / "vm.qed", user_directory / "mnt"
    with subprocess.Popen(
        [*AS_USER, *COMMAND, "-f", image, mnt],
        stderr=subprocess.PIPE, text=True, cwd="/", env=environment() | {"HOME": "/"},
    ) as process:  # fmt: skip
        mount = FrontMount(process, mnt)
        try:
            line = mount.read_line()  # it comes when the disk can be used
            assert as_user(*COMMAND, "umount", mnt).returncode == 0
            code, log = mount.finish()
        finally:
            process.kill()
    assert line.startswith(f"qedfuse: {mnt}: the kernel reads ahead 128 KiB, expected 512 KiB")
    assert "as root: echo 512 > /sys/class/bdi/" in line
    assert (code, "reads ahead" in log) == (0, False)
    done = as_user(*COMMAND, image, mnt, "-o", "readahead=2M")
    assert done.returncode == 0
    assert "option readahead: the kernel reads ahead 128 KiB, expected 2048 KiB" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert as_user(*COMMAND, "umount", mnt).returncode == 0
    done = as_user(*COMMAND, image, mnt, "-o", "readahead=64K")
    assert (done.returncode, done.stderr, read_ahead(mnt)) == (0, "", 64)
    assert as_user(*COMMAND, "umount", mnt).returncode == 0


def test_a_server_is_protected_while_memory_is_short_or_says_so_once(
    image: Path, tmp_path: Path
) -> None:
    """Each thread of a server has PR_SET_IO_FLUSHER, or a writable mount logs the lack once."""
    permitted = may_be_io_flusher()
    logged: list[str] = []
    for options, lines in ((("-r",), 0), ((), 0 if permitted else 1)):
        with front(*options, image, tmp_path / "mnt") as mount:
            (mount.mountpoint / "vm.raw").read_bytes()
            flags = io_flusher_flags(mount.process.pid)
            assert qedfuse("umount", mount.mountpoint).returncode == 0
            code, log = mount.finish()
        assert set(flags.values()) == {IO_FLUSHER if permitted else 0}
        assert (code, log.count("unmounted"), len(mount.unprotected)) == (0, 1, lines)
        logged += mount.unprotected
    prefix = f"qedfuse: {tmp_path / 'mnt'}: {UNPROTECTED}: "
    assert [line.startswith(prefix) for line in logged] == [True] * (not permitted)


COUNTED_THREADS: Final = """
import os, sys
os.environ.update({environment})
from qedfuse.mount.fuse import launderer
from qedfuse.mount.process import memorypressure

def counted(function):
    def count_and_call(*arguments):
        print("threads:", len(os.listdir("/proc/self/task")), file=sys.stderr)
        return function(*arguments)
    return count_and_call

memorypressure.protect_from_memory_pressure = counted(memorypressure.protect_from_memory_pressure)
launderer.Launderer.__init__ = counted(launderer.Launderer.__init__)
"""
NUMERIC_THREADS: Final = ("OPENBLAS", "GOTO", "OMP", "MKL", "BLIS")
"""The libraries that numpy can load, by the names in their variables for the number of threads."""


def test_numpy_starts_no_thread_before_the_protection_and_the_launderer(
    image: Path, tmp_path: Path
) -> None:
    """The server has one thread when it is protected and forks, whatever the environment says."""
    wanted = {f"{name}_NUM_THREADS": "4" for name in NUMERIC_THREADS}
    program = "import os, numpy; print(len(os.listdir('/proc/self/task')))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment(), **wanted},
        capture_output=True,
        text=True,
        check=True,
    )
    if done.stdout == "1\n":
        pytest.skip("numpy starts no threads on this machine")
    prelude = COUNTED_THREADS.format(environment=wanted)
    with front(image, tmp_path / "mnt", prelude=prelude) as mount:
        assert [mount.read_line() for _ in range(2)] == ["threads: 1\n"] * 2
        mount.process.terminate()
        assert mount.finish()[0] == 0
