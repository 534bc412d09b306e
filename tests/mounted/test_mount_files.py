"""What programs see of a mounted disk: size, times, end of file, truncation, refused changes."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import stat
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import qemu
from tests.support.disks import header_of
from tests.support.extensions import needs_extensions
from tests.support.mounted import front, mounted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DISK_BYTES = (8 << 20) + 512
"""Not a whole number of pages: the last page of the kernel's cache is partial."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give an image whose first and last cluster are filled with 7."""
    path = qemu.create(tmp_path / "vm.qed", DISK_BYTES)
    qemu.io(path, "write -P 7 0 64k", f"write -P 7 {DISK_BYTES - 512} 512")
    return path


@pytest.fixture(params=["directory", "file", "direct_io"])
def disk(request: pytest.FixtureRequest, image: Path, tmp_path: Path) -> Iterator[Path]:
    """Mount the image in each way that the kernel treats differently; give the disk."""
    mountpoint = tmp_path / "mnt"
    if request.param == "file":
        mountpoint.touch()
        with mounted(image, mountpoint) as file:
            yield file
    else:
        options = ("-o", "direct_io") if request.param == "direct_io" else ()
        with mounted(image, mountpoint, *options) as directory:
            yield directory / "vm.raw"


@contextmanager
def opened(disk: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """Open a disk without Python's buffering."""
    fd = os.open(disk, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def fails(*numbers: int) -> Iterator[None]:
    """Expect one of these errnos."""
    with pytest.raises(OSError, match="Errno") as caught:
        yield
    assert caught.value.errno in numbers


def corrected_size(disk: Path, expected: int = DISK_BYTES) -> int:
    """Return the size once the server has corrected it after a write past the end."""
    deadline = time.monotonic() + 60
    while (size := disk.stat().st_size) != expected and time.monotonic() < deadline:
        os.sched_yield()
    return size


def test_attributes_are_those_of_disk_and_image(disk: Path, image: Path) -> None:
    """st_size is the disk's; st_blocks, times and statvfs are those of the image file."""
    found, file = disk.stat(), image.stat()
    assert found.st_size == DISK_BYTES
    assert found.st_blocks == file.st_blocks
    assert found.st_mtime_ns == file.st_mtime_ns
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert stat.S_ISREG(found.st_mode)
    assert os.statvfs(disk).f_blocks == os.statvfs(image).f_blocks


def test_bytes_around_a_small_write_stay(disk: Path, image: Path) -> None:
    """A write of ten bytes changes ten bytes, in the disk and in the image."""
    with opened(disk, os.O_WRONLY) as fd:
        os.write(fd, b"A" * 10)
    assert disk.stat().st_size == DISK_BYTES
    expected = b"A" * 10 + b"\7" * 8182
    assert disk.read_bytes()[:8192] == expected
    with opened(disk, os.O_RDONLY) as fd:
        os.fsync(fd)
    assert expected in image.read_bytes()


def test_truncate_is_refused(disk: Path) -> None:
    """A truncation fails with EPERM unless it is to the disk's own size."""
    os.truncate(disk, DISK_BYTES)
    for size in (100, DISK_BYTES - 512, DISK_BYTES + 512):
        with fails(errno.EPERM):
            os.truncate(disk, size)
    assert disk.stat().st_size == DISK_BYTES


def test_reads_are_short_at_the_end(disk: Path) -> None:
    """Reads end at the end of the disk."""
    with opened(disk, os.O_RDONLY) as fd:
        assert os.pread(fd, 4096, DISK_BYTES - 512) == b"\7" * 512
        assert os.pread(fd, 4096, DISK_BYTES) == b""
        assert os.pread(fd, 4096, DISK_BYTES + (1 << 30)) == b""


@pytest.mark.parametrize("disk", ["file", "direct_io"], indirect=True)
def test_writes_are_short_at_the_end_and_fail_past_it(disk: Path) -> None:
    """Without the write-back cache a write is short at the end and fails with ENOSPC past it."""
    with opened(disk) as fd:
        assert os.pwrite(fd, b"x" * 4096, DISK_BYTES - 100) == 100
        with fails(errno.ENOSPC):
            os.pwrite(fd, b"x", DISK_BYTES)
    assert disk.stat().st_size == DISK_BYTES


@pytest.mark.parametrize("disk", ["directory"], indirect=True)
def test_cached_writes_past_the_end_fail_at_fsync_or_close(disk: Path) -> None:
    """With the write-back cache fsync or close reports ENOSPC, and the size is corrected."""
    with opened(disk) as fd:
        os.pwrite(fd, b"x" * 4096, DISK_BYTES - 100)
        with fails(errno.ENOSPC):
            os.fsync(fd)
    fd = os.open(disk, os.O_RDWR)
    os.pwrite(fd, b"x" * 4096, DISK_BYTES + (1 << 20))
    with fails(errno.ENOSPC):
        os.close(fd)
    assert corrected_size(disk) == DISK_BYTES
    assert disk.read_bytes()[-200:] == b"\7" * 100 + b"x" * 100


@pytest.mark.parametrize("disk", ["directory"], indirect=True)
def test_a_reader_does_not_consume_the_writers_error(disk: Path) -> None:
    """The writer's fsync gets ENOSPC although a reader's close sent the write past the end."""
    with opened(disk) as fd:
        os.pwrite(fd, b"x" * 4096, DISK_BYTES - 100)
        os.close(os.open(disk, os.O_RDONLY))
        with fails(errno.ENOSPC):
            os.fsync(fd)
    assert corrected_size(disk) == DISK_BYTES


def test_a_disk_cannot_be_overfilled(disk: Path, tmp_path: Path) -> None:
    """Writing more than fits fails with ENOSPC, and all that fits is there."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(DISK_BYTES + 3 * 65536))
    done = subprocess.run(
        ["dd", f"if={source}", f"of={disk}", "bs=64k", "conv=notrunc"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert os.strerror(errno.ENOSPC) in done.stderr
    assert corrected_size(disk) == DISK_BYTES
    assert disk.read_bytes() == source.read_bytes()[:DISK_BYTES]


def test_unaligned_io(disk: Path) -> None:
    """Reads and writes work at any offset and length."""
    with opened(disk) as fd:
        assert os.pwrite(fd, b"seven b", 3) == 7
        assert os.pread(fd, 9, 2) == b"\7seven b\7"[:9]
        assert os.pwrite(fd, b"z" * 70001, 65530) == 70001
        assert os.pread(fd, 3, 65530 + 70000) == b"z\0\0"


def test_direct_io(disk: Path) -> None:
    """O_DIRECT reads what was written through the cache, and the other way round."""
    with mmap.mmap(-1, 4096) as page, opened(disk, os.O_RDWR | os.O_DIRECT) as fd:
        assert os.preadv(fd, [page], 0) == 4096
        assert page[:] == b"\7" * 4096
        page[:] = b"d" * 4096
        assert os.pwritev(fd, [page], 4096) == 4096
        with fails(errno.ENOSPC):
            os.pwritev(fd, [page], (DISK_BYTES + 4095) // 4096 * 4096)
    assert disk.read_bytes()[4000:8200] == b"\7" * 96 + b"d" * 4096 + b"\7" * 8


@pytest.mark.parametrize("disk", ["directory", "file"], indirect=True)
def test_shared_memory_maps(disk: Path) -> None:
    """Stores into a shared memory map reach the disk."""
    with opened(disk) as fd, mmap.mmap(fd, 8192) as memory:
        memory[5000:5003] = b"abc"
        memory.flush()
    assert disk.read_bytes()[4999:5004] == b"\7abc\7"


def test_times_can_be_set_and_owner_and_mode_not(disk: Path, image: Path) -> None:
    """Times can be set and reach the image; owner and mode can only be set to what they are."""
    os.utime(disk, ns=(10**18, 2 * 10**18))
    assert disk.stat().st_mtime_ns == 2 * 10**18
    assert image.stat().st_mtime_ns == 2 * 10**18
    subprocess.run(["touch", disk], check=True)
    with fails(errno.EPERM):
        disk.chmod(0o644)
    with fails(errno.EPERM):
        os.chown(disk, 1, 1)
    disk.chmod(0o600)
    os.chown(disk, os.getuid(), os.getgid())


def test_the_directory_cannot_be_changed(image: Path, tmp_path: Path) -> None:
    """Creating, removing and renaming files fails: the images decide what is in the directory."""
    with mounted(image, tmp_path / "mnt") as directory:
        with fails(errno.EPERM):
            (directory / "new").touch()
        with fails(errno.EPERM):
            (directory / "new").mkdir()
        with fails(errno.EPERM):
            (directory / "vm.raw").unlink()
        with fails(errno.EPERM):
            (directory / "vm.raw").rename(directory / "other")
        with fails(errno.EOPNOTSUPP):
            os.getxattr(directory / "vm.raw", "user.x")
        assert [path.name for path in directory.iterdir()] == ["vm.raw"]
        assert not (directory / "other").exists()


def test_read_only(image: Path, tmp_path: Path) -> None:
    """With ro the kernel refuses writes, the mode shows it, and the image does not change."""
    before = image.read_bytes()
    with mounted(image, tmp_path / "mnt", "-o", "ro") as directory:
        disk = directory / "vm.raw"
        assert stat.S_IMODE(disk.stat().st_mode) == 0o400
        with fails(errno.EROFS):
            os.open(disk, os.O_RDWR)
        with fails(errno.EROFS):
            os.utime(disk)
        assert disk.read_bytes()[:4] == b"\7" * 4
    assert image.read_bytes() == before


def test_growable(image: Path, tmp_path: Path) -> None:
    """With growable, truncation and writes past the end enlarge the disk; it never shrinks."""
    with mounted(image, tmp_path / "mnt", "-o", "growable") as directory:
        disk = directory / "vm.raw"
        os.truncate(disk, DISK_BYTES * 2)
        assert disk.stat().st_size == DISK_BYTES * 2
        with fails(errno.EPERM):
            os.truncate(disk, DISK_BYTES)
        with opened(disk) as fd:
            assert os.pwrite(fd, b"n" * 70000, DISK_BYTES * 3) == 70000
            os.fsync(fd)
        assert disk.stat().st_size >= DISK_BYTES * 3 + 70000
    assert qemu.info(image)["virtual-size"] == -(-(DISK_BYTES * 3 + 70000) // 512) * 512
    content = qemu.content(image)
    assert content[DISK_BYTES * 3 : DISK_BYTES * 3 + 70000] == b"n" * 70000
    assert not any(content[DISK_BYTES : DISK_BYTES * 3])
    assert qemu.check(image).code == 0


def test_a_cached_write_that_cannot_grow_a_disk_leaves_its_size(tmp_path: Path) -> None:
    """If a disk cannot grow for a cached write past its end, the kernel's size is corrected.

    The writer gets the error, writes that the disk can grow for stay, and copies have no zeros
    past the end.
    """
    image = qemu.create(tmp_path / "vm.qed", 1 << 20, cluster_size=4096, table_size=2)
    largest = 1024 * 1024 * 4096  # bytes that the tables can address
    with mounted(image, tmp_path / "mnt", "-o", "growable") as directory:
        disk = directory / "vm.raw"
        with opened(disk) as fd:
            os.pwrite(fd, b"in", 3 << 20)
            os.pwrite(fd, b"out", largest + 4096)
            assert os.fstat(fd).st_size == largest + 4099
            with fails(errno.EFBIG):
                os.fsync(fd)
        grown = (3 << 20) + 4096  # the kernel sends the whole page
        assert corrected_size(disk, grown) == grown
        content = disk.read_bytes()
        assert len(content) == grown
        assert content[3 << 20 :][:3] == b"in\0"
    assert qemu.check(image).errors == 0


def write_last(disk: Path, end: int) -> None:
    """Write the last byte before an end, durably."""
    with opened(disk) as fd:
        assert os.pwrite(fd, b"\0", end - 1) == 1
        os.fsync(fd)


def run_with_end(*command: str) -> Callable[[Path, int], object]:
    """Return a function that runs a command with an end and a disk as its last words."""
    return lambda disk, end: subprocess.run([*command, str(end), disk], check=True)


GROWTH: Final[dict[str, Callable[[Path, int], object]]] = {
    "truncate(2)": os.truncate,
    "truncate -s": run_with_end("truncate", "-s"),
    "fallocate -l": run_with_end("fallocate", "-l"),
    "write": write_last,
}
"""The ways in which a disk grows to an end."""


@needs_extensions
@pytest.mark.parametrize("options", ["growable", "growable,direct_io", "growable,truncate=zero"])
def test_growth_is_rounded_up_to_whole_sectors(image: Path, tmp_path: Path, options: str) -> None:
    """Each way of growth to a part of a sector takes in the whole sector, and logs no error."""
    with front("-o", options, image, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "vm.raw"
        sectors = DISK_BYTES // 512
        for name, grow in GROWTH.items():
            for rest in (1, 511, 512):
                grow(disk, 512 * sectors + rest)
                sectors += 1
                assert header_of(image.read_bytes()[:64]).image_size == 512 * sectors, name
                if "truncate" in name:
                    assert disk.stat().st_size == 512 * sectors
        mount.process.terminate()
        code, log = mount.finish()
    assert code == 0
    assert log.count("\n") == 1, log  # the line about the end
    assert qemu.info(image)["virtual-size"] == 512 * sectors
    assert qemu.content(image)[DISK_BYTES:] == bytes(512 * sectors - DISK_BYTES)
    assert qemu.check(image).code == 0


def test_owner_and_mode_follow_the_options(image: Path, tmp_path: Path) -> None:
    """uid, gid and umask set the owner and mode of disk and directory."""
    with mounted(image, tmp_path / "mnt", "-o", "uid=12,gid=34,umask=027") as directory:
        found = (directory / "vm.raw").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12, 34, 0o640)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o550


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ("rw", os.O_DSYNC),
        ("rw", os.O_DSYNC | os.O_DIRECT),
        ("direct_io", os.O_DSYNC),
        ("direct_io", os.O_SYNC),
        ("direct_io,sync", 0),
    ],
)
def test_a_synchronous_write_is_durable(options: str, flags: int, tmp_path: Path) -> None:
    """A write with O_DSYNC, O_SYNC or the option sync survives a kill once it has returned."""
    image = qemu.create(tmp_path / "vm.qed", DISK_BYTES)
    with (
        front(image, "-o", f"commit=3600,{options}", tmp_path / "mnt") as mount,
        mmap.mmap(-1, 4096) as page,
    ):
        page[:] = b"d" * 4096
        fd = os.open(mount.mountpoint / "vm.raw", os.O_RDWR | flags)
        try:
            assert os.pwritev(fd, [page], 1 << 20) == 4096
            mount.signal(signal.SIGKILL)
            assert mount.finish()[0] == -signal.SIGKILL
        finally:
            with suppress(OSError):
                os.close(fd)
    assert qemu.content(image)[1 << 20 :][:4097] == b"d" * 4096 + b"\0"
