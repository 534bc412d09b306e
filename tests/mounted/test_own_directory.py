"""A mount over the directory of its own image, or over any other file of its server.

Nothing that the server does for a request may resolve a path that leads through the mount:
the kernel would ask the server, which waits for the kernel.  So each case here covers files
that the server has used before, and then uses every operation of the mount.  It runs in a
mount and a process namespace of its own, which are killed if anything hangs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support import qemu
from tests.support.mounted import COMMAND
from tests.support.programs import TREE
from tests.support.sandbox import run_in_sandbox

DISK_BYTES: Final = 16 << 20

PROGRAM: Final = r"""
import ctypes, errno, mmap, os, select, signal, socket, stat, subprocess, sys

tree, image, mountpoint, end, options, *command = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
words = set(options.split(","))
real = os.path.dirname(image)
covered = os.open(real, os.O_RDONLY | os.O_DIRECTORY)
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind(real + "/notify")
environment = {
    **os.environ, "PYTHONPATH": tree, "PYTHONWARNINGS": "error", "TMPDIR": real, "HOME": real,
    "NOTIFY_SOCKET": real + "/notify",
}

if os.geteuid() != 0:
    environment["XDG_RUNTIME_DIR"] = real
records = environment["XDG_RUNTIME_DIR"] if os.geteuid() != 0 else "/run"
os.makedirs(records + "/qedfuse", exist_ok=True)


def run(*arguments):
    subprocess.run([*command, *arguments], env=environment, check=True, timeout=200)


def check(number):
    if number != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def refused(numbers, function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        assert error.errno in numbers, (function, error)
    else:
        raise AssertionError(function)


run(image, mountpoint, "--pidfile", real + "/pid", "-o", options)
assert manager.recv(100) == b"READY=1"
# A descriptor that is older than the mount shows what the mount covers.
pid = int(os.read(os.open("pid", os.O_RDONLY, dir_fd=covered), 100))
process = os.pidfd_open(pid)
is_directory = stat.S_ISDIR(os.stat(mountpoint).st_mode)
disk = mountpoint + "/vm.raw" if is_directory else mountpoint
size = os.stat(disk).st_size
assert size == 16 << 20
if is_directory:
    assert os.listdir(mountpoint) == ["vm.raw"]
    no = {errno.EPERM, errno.EROFS, errno.EACCES}
    refused(no, os.rename, disk, mountpoint + "/other")
    refused(no, os.unlink, disk)
    refused(no, os.mkdir, mountpoint + "/new")
    refused(no, os.symlink, "x", mountpoint + "/link")
    refused(no, os.open, mountpoint + "/new", os.O_CREAT | os.O_RDWR)
    root = os.open(mountpoint, os.O_RDONLY)
    os.fsync(root)
    os.close(root)
    refused({errno.ENOENT}, os.stat, mountpoint + "/vm.qed")
for path in (mountpoint, disk):
    assert os.statvfs(path).f_blocks == os.fstatvfs(covered).f_blocks
refused({errno.EOPNOTSUPP}, os.getxattr, disk, "user.x")
if "ro" in words:
    refused({errno.EROFS}, os.open, disk, os.O_RDWR)
    fd = os.open(disk, os.O_RDONLY)
else:
    os.utime(disk, (1e9, 1e9))
    fd = os.open(disk, os.O_RDWR)
    for at in range(0, 8 << 20, 1 << 20):
        os.pwrite(fd, b"\x05" * 65536, at)
    os.fsync(fd)
    if os.environ.get("QEDFUSE_TEST_EXTENSIONS") != "none":
        check(libc.fallocate(fd, 3, ctypes.c_long(2 << 20), ctypes.c_long(1 << 20)))
        check(libc.fallocate(fd, 1, ctypes.c_long(9 << 20), ctypes.c_long(1 << 20)))
    os.pwrite(fd, b"\x06" * 65536, 12 << 20)
    os.truncate(disk, size)
    os.ftruncate(fd, size)
    if "direct_io" not in words:
        with mmap.mmap(fd, 65536) as pages:
            pages[4096:4100] = b"\x05" * 4
            pages.flush()
    if "growable" in words:
        os.ftruncate(fd, size + 65536)
        os.pwrite(fd, b"\x07" * 65536, size + 65536)
        os.fsync(fd)
        assert os.stat(disk).st_size == size + 131072
    else:
        def past_the_end():
            os.pwrite(fd, b"\x07" * 4096, size)
            os.fsync(fd)
        refused({errno.ENOSPC, errno.EFBIG}, past_the_end)
        refused({errno.EPERM}, os.ftruncate, fd, size + 65536)
    assert os.pread(fd, 65536, 12 << 20) == b"\x06" * 65536
os.lseek(fd, 0, os.SEEK_HOLE)
if "ro" not in words:
    assert os.lseek(fd, 2 << 20, os.SEEK_DATA) >= 2 << 20
libc.syncfs(fd)  # it may report the failed write past the end
os.pread(fd, 1 << 20, 0)
os.utime(disk) if "ro" not in words else None
if end == "busy":
    # In use: the first signal makes the disk durable, the second one ends the mount.
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
else:
    os.close(fd)
    if end == "signal":
        os.kill(pid, signal.SIGTERM)
    elif end == "umount":
        run("umount", mountpoint)
    else:
        check(libc.umount2(mountpoint.encode(), 0))
ended = select.poll()
ended.register(process, select.POLLIN)
assert ended.poll(50000)
assert manager.recv(100) == b"STOPPING=1"
refused({errno.ENOENT}, os.stat, real + "/pid")
left = [open(f"{records}/qedfuse/{name}").read() for name in os.listdir(records + "/qedfuse")]
assert left == [], left
print("ended well")
"""


@pytest.mark.parametrize(
    ("covered", "end", "options"),
    [
        (".", "umount", "rw"),
        (".", "signal", "growable,freelist=on,compact"),
        (".", "busy", "snapshot"),
        ("..", "kernel", "direct_io,overlay={directory}/top.qed,detect_zeroes=unmap"),
        ("vm.qed", "umount", "nodiscard"),
        (".", "kernel", "ro"),
        # The interpreter and its libraries; the package; the mount records.
        (sys.prefix, "signal", "growable,freelist=on,compact"),
        (str(TREE), "busy", "detect_zeroes=on"),
        ("/run/qedfuse", "umount", "snapshot"),
    ],
)
def test_a_mount_may_cover_files_that_its_server_uses(
    tmp_path: Path, covered: str, end: str, options: str
) -> None:
    """A mount over its image's directory, the interpreter or its records never waits for itself."""
    directory = tmp_path / "images" / "d"
    directory.mkdir(parents=True)
    image = qemu.create(directory / "vm.qed", DISK_BYTES)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    mountpoint = (directory / covered).resolve()
    words = [str(TREE), str(image), str(mountpoint), end, options.format(directory=directory)]
    # exec: the shell must not look up a program once the mount covers it.
    script = f'exec {sys.executable} "$@"'
    printed = run_in_sandbox(script, program, *map(Path, [*words, *COMMAND]))
    assert printed.endswith("ended well\n"), printed
    assert qemu.check(image).errors == 0
    changed = directory / "top.qed" if "overlay" in options else image
    kept = options != "ro" and "snapshot" not in options
    qemu.io(changed, f"read -P {5 if kept else 0} 0 64k")
    qemu.io(changed, f"read -P {6 if kept else 0} 12M 64k")


USER: Final = """
    mknod -m 666 /run/fuse c 10 229
    mount --bind /run/fuse /dev/fuse
    chmod 755 /srv
    mkdir /srv/d
    cp "$2" /srv/d/vm.qed
    chown -R 65534:65534 /srv/d
    # The capability lets the user search directories: the interpreter may lie in root's home.
    setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=+dac_read_search \
        --ambient-caps=+dac_read_search "$4" "$3" "$1" /srv/d/vm.qed /srv/d signal rw \
        "$4" -m qedfuse
    qemu-img check -q /srv/d/vm.qed
    qemu-io -r -f qed -c "read -P 6 12M 64k" /srv/d/vm.qed
"""


def test_an_ordinary_user_may_cover_files_that_the_server_uses(tmp_path: Path) -> None:
    """A user's mount over its own image, with fusermount3, never waits for itself."""
    image = qemu.create(tmp_path / "vm.qed", DISK_BYTES)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    program.chmod(0o644)
    printed = run_in_sandbox(USER, TREE, image, program, Path(sys.executable))
    assert "ended well\n" in printed, printed
    assert "read 65536/65536 bytes" in printed
