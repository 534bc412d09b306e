"""Partitions as files of a mount (``-o partitions`` and ``-o partition=N``)."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.hostio.systemcalls import FALLOC_PUNCH_HOLE, fallocate
from tests.support import qemu
from tests.support.devices import file_system, loop_device, run
from tests.support.extensions import needs_extensions
from tests.support.mounted import front, mounted, refused
from tests.support.partitiontables import draw_table, partition

if TYPE_CHECKING:
    from collections.abc import Callable

SECTOR: Final = 512
MIB: Final = 1 << 20
DOS: Final = (
    "label: dos",
    "start=63, size=4001",
    "start=4096, size=4096",
    "start=8192, size=16384, type=5",
    "start=10240, size=2048",
    "start=14336, size=2048, type=82",
)
"""A table with an unaligned partition (1), an extended one (3), and two logical ones (5, 6)."""
PLACES: Final = {1: (63, 4001), 2: (4096, 4096), 5: (10240, 2048), 6: (14336, 2048)}
"""First sector and number of sectors of each partition that has a file."""
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can attach a loop device")


def make_image(tmp_path: Path, lines: tuple[str, ...] = DOS, size: int = 16 * MIB) -> Path:
    """Make an image of a disk of random bytes with a partition table."""
    raw, image = tmp_path / "vm.raw", tmp_path / "vm.qed"
    raw.write_bytes(bytes(MIB) + random.Random("disk").randbytes(size - MIB))
    if lines:
        partition(raw, list(lines))
    qemu.convert(raw, image, source_format="raw", target_format="qed")
    return image


def partitions_in(directory: Path) -> dict[int, int]:
    """Return the sizes of the files of partitions, by number, and check their names."""
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    del sizes["vm.raw"]
    assert all(name.startswith("vm.raw.p") for name in sizes)
    return {int(name.removeprefix("vm.raw.p")): size for name, size in sorted(sizes.items())}


def error_of(path: Path, flags: int) -> int:
    """Open a file, and close it; return the errno, or 0."""
    try:
        os.close(os.open(path, flags))
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.parametrize("seed", range(6))
def test_the_files_are_the_partitions_of_partx(seed: int, tmp_path: Path) -> None:
    """Numbers and places are those of partx, except for extended partitions."""
    image = make_image(tmp_path, tuple(draw_table(random.Random(seed))), 100 * MIB)
    raw = tmp_path / "vm.raw"
    listed = subprocess.run(
        ["partx", "--raw", "--noheadings", "--output", "NR,START,SECTORS,TYPE", raw],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    rows = [line.split() for line in listed.splitlines()]
    expected = {
        int(number): (int(start), int(count))
        for number, start, count, kind in rows
        if kind not in {"0x5", "0xf"}
    }
    content = raw.read_bytes()
    with mounted(image, tmp_path / "mnt", "-o", "ro,partitions") as mountpoint:
        assert partitions_in(mountpoint) == {
            number: count * SECTOR for number, (_start, count) in expected.items()
        }
        for number, (start, count) in expected.items():
            found = (mountpoint / f"vm.raw.p{number}").read_bytes()
            assert found == content[start * SECTOR :][: count * SECTOR]


def test_a_gpt_with_sectors_of_4096_bytes(tmp_path: Path) -> None:
    """The places of partitions count in the sectors of the table, not in those of 512 bytes."""
    size = 16 * MIB
    raw, image = tmp_path / "vm.raw", tmp_path / "vm.qed"
    raw.write_bytes(bytes(MIB) + random.Random("disk").randbytes(size - MIB))
    # Only newer versions of sfdisk know --sector-size.
    subprocess.run(
        ["fdisk", "-b", "4096", str(raw)],
        input="g\nn\n1\n512\n1023\nn\n2\n1280\n1537\nw\n",
        text=True, check=True, capture_output=True,
    )  # fmt: skip
    qemu.convert(raw, image, source_format="raw", target_format="qed")
    content = raw.read_bytes()
    with mounted(image, tmp_path / "mnt", "-o", "partitions") as mountpoint:
        assert partitions_in(mountpoint) == {1: 512 * 4096, 2: 258 * 4096}
        assert (mountpoint / "vm.raw.p1").read_bytes() == content[512 * 4096 : 1024 * 4096]
        with (mountpoint / "vm.raw.p2").open("r+b") as file:
            file.write(b"w" * 258 * 4096)
        assert (mountpoint / "vm.raw").read_bytes() == (
            content[: 1280 * 4096] + b"w" * 258 * 4096 + content[1538 * 4096 :]
        )


def test_a_hybrid_gpt_has_the_partitions_of_its_gpt(tmp_path: Path) -> None:
    """Entries that the boot record has beside the protective one have no files."""
    raw = tmp_path / "vm.raw"
    image = make_image(tmp_path, ("label: gpt", "start=2048, size=2048", "start=6144, size=4095"))
    # In the boot record: a protective entry up to the first partition, then one of another place.
    entries = struct.pack("<8xII", 1, 2047), struct.pack("<8xII", 5000, 1000)
    record = b"".join(
        entry[:4] + bytes([kind]) + entry[5:]
        for entry, kind in zip(entries, (0xEE, 0x83), strict=True)
    )
    content = bytearray(raw.read_bytes())
    content[446:510] = record.ljust(64, b"\0")
    raw.write_bytes(content)
    qemu.convert(raw, image, source_format="raw", target_format="qed")
    with mounted(image, tmp_path / "mnt", "-o", "ro,partitions") as mountpoint:
        assert partitions_in(mountpoint) == {1: 2048 * SECTOR, 2: 4095 * SECTOR}
        assert (mountpoint / "vm.raw.p2").read_bytes() == content[6144 * SECTOR :][: 4095 * SECTOR]


def test_a_bare_file_system_has_no_partitions(tmp_path: Path) -> None:
    """A disk whose first sector begins a file system has no file beside that of the disk."""
    image = make_image(tmp_path, ())
    with mounted(image, tmp_path / "mnt", "-o", "partitions") as mountpoint:
        run("mkfs.fat", mountpoint / "vm.raw")
        assert partitions_in(mountpoint) == {}


def test_a_table_that_is_rewritten_is_followed(tmp_path: Path) -> None:
    """The files follow when the disk's writer has closed it; a file that stays keeps its inode."""
    image = make_image(tmp_path)
    with mounted(image, tmp_path / "mnt", "-o", "partitions") as mountpoint:
        disk, first, second = (mountpoint / name for name in ("vm.raw", "vm.raw.p1", "vm.raw.p2"))
        assert partitions_in(mountpoint) == {
            number: count * SECTOR for number, (_start, count) in PLACES.items()
        }
        old = first.stat().st_ino, second.stat().st_ino
        held = os.open(first, os.O_PATH)
        first.read_bytes()
        with disk.open("r+b") as file:
            file.seek(454)
            file.write((100).to_bytes(4, "little") + (200).to_bytes(4, "little"))
            file.flush()
            assert first.stat().st_size == 4001 * SECTOR  # the writer has not closed yet
            assert error_of(first, os.O_RDONLY) == errno.EBUSY
        assert first.stat().st_size == 200 * SECTOR
        content = disk.read_bytes()
        assert first.read_bytes() == content[100 * SECTOR : 300 * SECTOR]
        assert (first.stat().st_ino == old[0], second.stat().st_ino == old[1]) == (False, True)
        # A reference to the former file leads nowhere, and never to other bytes.
        assert error_of(Path(f"/proc/self/fd/{held}"), os.O_RDONLY) == errno.ESTALE
        os.close(held)
        partition(disk, ["label: gpt", "size=1M", "size=2M"])
        assert partitions_in(mountpoint) == {1: MIB, 2: 2 * MIB}
        partition(disk, ["label: gpt"])
        assert partitions_in(mountpoint) == {}
        assert error_of(second, os.O_RDONLY) == errno.ENOENT


def test_files_with_the_same_bytes_exclude_each_other(tmp_path: Path) -> None:
    """A writer excludes the other files with its bytes, and one log line names the other file."""
    image = make_image(tmp_path)
    with front(image, "-o", "partitions", tmp_path / "mnt") as mount:
        disk, first, second = (
            mount.mountpoint / name for name in ("vm.raw", "vm.raw.p1", "vm.raw.p2")
        )
        write, read = os.O_RDWR, os.O_RDONLY
        busy = errno.EBUSY
        asked = [(item, how) for item in (disk, first, second) for how in (read, write)]
        for held, how, expected in (
            (disk, read, [0, 0, 0, busy, 0, busy]),
            (disk, write, [0, 0, busy, busy, busy, busy]),
            (first, read, [0, busy, 0, 0, 0, 0]),
            (first, write, [busy, busy, 0, 0, 0, 0]),
        ):
            fd = os.open(held, how)
            assert [error_of(*item) for item in asked] == expected, (held, how)
            os.close(fd)
        fd = os.open(first, read)
        with pytest.raises(OSError, match="busy"):
            os.truncate(disk, 0)
        os.close(fd)
        assert error_of(disk, write) == 0
        mount.signal(signal.SIGTERM)
        code, log = mount.finish()
    assert code == 0
    assert (
        "vm.raw: cannot be opened for writing: vm.raw.p1, which has the same bytes, is open\n"
        in log
    )
    assert (
        "vm.raw.p1: cannot be opened: vm.raw, which has the same bytes, is open for writing\n"
        in log
    )


def write_buffered(path: Path, offset: int, data: bytes) -> None:
    """Write through the kernel's page cache."""
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        assert file.write(data) == len(data)


def write_direct(path: Path, offset: int, data: bytes) -> None:
    """Write past the kernel's page cache."""
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    with mmap.mmap(-1, len(data)) as buffer:
        buffer.write(data)
        assert os.pwritev(fd, [buffer], offset) == len(data)
    os.close(fd)


def write_mapped(path: Path, offset: int, data: bytes) -> None:
    """Write to a shared memory map, which stays after the file is closed, and unmap it."""
    with path.open("r+b") as file:
        view = mmap.mmap(file.fileno(), 0)
    view[offset : offset + len(data)] = data
    view.close()


def discard(path: Path, offset: int, data: bytes) -> None:
    """Discard a range of the length of ``data``."""
    with path.open("r+b", buffering=0) as file:
        fallocate(file.fileno(), FALLOC_PUNCH_HOLE, offset, len(data))


WRITERS: Final = (write_buffered, write_direct, write_mapped, discard)


@needs_extensions
@pytest.mark.parametrize("options", ["partitions", "partitions,direct_io"])
def test_files_agree_after_every_change(options: str, tmp_path: Path) -> None:
    """Each kind of change through each file is seen through all files, whose pages were cached."""
    image = make_image(tmp_path, size=13 * MIB)
    model = bytearray((tmp_path / "vm.raw").read_bytes())
    views = {f"vm.raw.p{number}": (start * SECTOR, count * SECTOR)
             for number, (start, count) in PLACES.items()}  # fmt: skip
    views["vm.raw"] = (0, len(model))
    chance = random.Random(options)
    ways = WRITERS if "direct" not in options else (write_buffered, discard)
    turns = [(way, name) for way in ways for name in views]
    chance.shuffle(turns)
    with mounted(image, tmp_path / "mnt", "-o", options) as mountpoint:
        for way, name in turns:
            start, size = views[name]
            # The boot records of the table keep their content.
            low = (views["vm.raw.p6"][0] if name == "vm.raw" else 0) + chance.randrange(0, 8192)
            length = min(chance.choice((1, 511, 4096, 70000, 200000)), size - low)
            data = bytes(length) if way is discard else chance.randbytes(length)
            way(mountpoint / name, low, data)
            model[start + low : start + low + length] = data
            for other, (at, count) in views.items():
                found = (mountpoint / other).read_bytes()
                assert found == model[at : at + count], (way, name, other)


_COUNT: Final = """
import mmap, os, sys
path, offset, rounds, mapped = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
refused = False
for _ in range(rounds):
    while True:
        try:
            fd = os.open(path, os.O_RDWR)
            break
        except OSError as error:
            if error.errno != 16:
                raise
            if not refused:
                refused = True
                print("refused", flush=True)
            os.sched_yield()
    if mapped == "yes":
        view = mmap.mmap(fd, 0)
        os.close(fd)
        number = int.from_bytes(view[offset : offset + 8], "little") + 1
        view[offset : offset + 8] = number.to_bytes(8, "little")
        view.close()
    else:
        number = int.from_bytes(os.pread(fd, 8, offset), "little") + 1
        os.pwrite(fd, number.to_bytes(8, "little"), offset)
        os.close(fd)
"""


def test_writers_through_two_files_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    """A counter that one program increments through the disk and another through a partition."""
    image = make_image(tmp_path)
    rounds, place = 25, 8192
    with mounted(image, tmp_path / "mnt", "-o", "partitions") as mountpoint:
        first = mountpoint / "vm.raw.p1"
        write_buffered(first, place, bytes(8))
        start = [sys.executable, "-c", _COUNT]
        with first.open("r+b"):
            by_disk = subprocess.Popen(
                [
                    *start,
                    mountpoint / "vm.raw",
                    str(place + PLACES[1][0] * SECTOR),
                    str(rounds),
                    "no",
                ],
                stdout=subprocess.PIPE,
            )
            assert by_disk.stdout is not None
            assert by_disk.stdout.readline() == b"refused\n"
            by_partition = subprocess.Popen([*start, first, str(place), str(rounds), "yes"])
        by_disk.communicate(timeout=60)
        assert (by_disk.returncode, by_partition.wait(timeout=60)) == (0, 0)
        assert int.from_bytes(first.read_bytes()[place:][:8], "little") == 2 * rounds


@needs_root
def test_loop_devices_on_partition_and_disk(tmp_path: Path) -> None:
    """A file system is mounted from its partition's file; then the disk has the same bytes."""
    image = make_image(tmp_path, ("label: dos", "start=63, size=30001"))
    with mounted(image, tmp_path / "mnt", "-o", "partitions") as mountpoint:
        disk, first = mountpoint / "vm.raw", mountpoint / "vm.raw.p1"
        run("mkfs.ext4", "-q", first)
        with loop_device(first) as device, file_system(device, tmp_path / "fs") as directory:
            (directory / "letter").write_text("from the partition", encoding="ascii")
            busy = subprocess.run(
                ["losetup", "--find", "--show", disk], capture_output=True, text=True, check=False
            )
            assert "busy" in busy.stderr
            run("fstrim", directory)
        option = ("--offset", str(63 * SECTOR), "--sizelimit", str(30001 * SECTOR))
        with loop_device(disk, *option) as device:
            assert error_of(first, os.O_RDONLY) == errno.EBUSY
            with file_system(device, tmp_path / "fs") as directory:
                assert (directory / "letter").read_text(encoding="ascii") == "from the partition"
                (directory / "letter").write_text("from the disk", encoding="ascii")
        run("e2fsck", "-fn", first)
        with loop_device(first) as device, file_system(device, tmp_path / "fs") as directory:
            assert (directory / "letter").read_text(encoding="ascii") == "from the disk"


@needs_extensions
def test_a_partition_ends_where_its_table_says(tmp_path: Path) -> None:
    """Reads, writes, discards, searches and truncations at the end are confined to a partition."""
    image = make_image(tmp_path)
    model = (tmp_path / "vm.raw").read_bytes()
    size, start = PLACES[1][1] * SECTOR, PLACES[1][0] * SECTOR
    with mounted(image, tmp_path / "mnt", "-o", "partitions,growable") as mountpoint:
        first = mountpoint / "vm.raw.p1"
        with first.open("r+b", buffering=0) as file:
            fd = file.fileno()
            assert os.pread(fd, 8192, size - 100) == model[start + size - 100 : start + size]
            assert os.pread(fd, 1, size) == b""
            direct = os.open(first, os.O_WRONLY | os.O_DIRECT)
            for offset in (size - 100, size):
                with mmap.mmap(-1, 4096) as buffer, pytest.raises(OSError) as failed:  # noqa: PT011  errno below
                    os.pwritev(direct, [buffer], offset)
                assert failed.value.errno == errno.ENOSPC
            os.close(direct)
            for length in (0, size - 1, size + 512):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, length)
            fallocate(fd, FALLOC_PUNCH_HOLE, MIB, 8 * MIB)
            assert os.lseek(fd, 0, os.SEEK_DATA) <= MIB - start
            assert os.lseek(fd, MIB + 65536, os.SEEK_HOLE) == MIB + 65536
            # The cluster at the end of the partition is in use, because the next partition
            # or the gap before it has a part of it.
            assert (
                os.lseek(fd, MIB + 65536, os.SEEK_DATA) == (start + size) // 65536 * 65536 - start
            )
            assert os.lseek(fd, MIB - start, os.SEEK_HOLE) >= MIB - start
        assert first.stat().st_size == size
        assert first.stat().st_blocks <= size // SECTOR
        content = (mountpoint / "vm.raw").read_bytes()
    changed = bytearray(model)
    changed[start + size - 100 : start + size] = bytes(100)
    changed[start + MIB : start + size] = bytes(size - MIB)
    assert content == changed


def test_partitions_take_no_more_space_than_the_image(tmp_path: Path) -> None:
    """The blocks of the partitions, an estimate, add up to no more than those of the image."""
    raw, image = tmp_path / "vm.raw", tmp_path / "vm.qed"
    with raw.open("wb") as file:
        file.truncate(16 * MIB)
        file.seek(3 * MIB)
        file.write(random.Random("few").randbytes(MIB))
    partition(raw, list(DOS))
    qemu.convert(raw, image, source_format="raw", target_format="qed")
    with mounted(image, tmp_path / "mnt", "-o", "ro,partitions") as mountpoint:
        blocks = [path.stat().st_blocks for path in mountpoint.glob("vm.raw.p*")]
        whole = (mountpoint / "vm.raw").stat().st_blocks
    assert len(blocks) == len(PLACES)
    assert whole == image.stat().st_blocks
    assert sum(blocks) < whole + len(blocks), "each is rounded up by less than one"
    assert min(blocks) > 0, "tar treats a file without blocks as one hole"


def test_one_partition_is_the_mountpoint(tmp_path: Path) -> None:
    """With ``partition=N`` the mountpoint, or the only file in it, is partition N."""
    image = make_image(tmp_path)
    model = bytearray((tmp_path / "vm.raw").read_bytes())
    start, count = PLACES[5]
    target = tmp_path / "file"
    target.touch()
    with mounted(image, target, "-o", "partition=5"):
        assert target.read_bytes() == model[start * SECTOR :][: count * SECTOR]
        write_buffered(target, 1000, b"written")
        model[start * SECTOR + 1000 :][:7] = b"written"
    model[start * SECTOR + 1000 : start * SECTOR + 1007] = b"written"
    assert qemu.content(image) == model
    with mounted(image, tmp_path / "mnt", "-o", "partition=2") as mountpoint:
        assert [path.name for path in mountpoint.iterdir()] == ["vm.raw.p2"]
        assert os.access(mountpoint / "vm.raw.p2", os.W_OK)


@pytest.mark.parametrize(
    ("option", "lines", "message"),
    [
        ("partition=7", DOS, "found no partition 7, expected one of 1, 2, 5, 6"),
        ("partition=3", DOS, "found no partition 3, expected one of 1, 2, 5, 6"),
        ("partition=1", (), "found no partition 1, the disk has no partitions"),
        ("partition=0", (), "option partition: found 0, expected the number of a partition"),
        ("partition=1,partitions", (), "options partitions and partition exclude each other"),
        ("partition=1,growable", (), "options growable and partition exclude each other"),
    ],
)
def test_a_missing_partition_is_refused(
    option: str, lines: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    """One line says which partitions there are, and nothing is mounted."""
    image = make_image(tmp_path, lines)
    assert message in refused(image, tmp_path, "-o", option, code=1)


def test_options_that_need_another_mountpoint_or_one_image(tmp_path: Path) -> None:
    """A file shows one disk, and ``partition=N`` is a partition of one image."""
    image, target = make_image(tmp_path), tmp_path / "file"
    target.touch()
    found = refused(image, target, "-o", "partitions", code=1)
    assert "found a file as mountpoint, expected a directory; partition=NUMBER" in found
    other = tmp_path / "other.qed"
    other.write_bytes(image.read_bytes())
    found = refused(image, other, tmp_path / "mnt", "-o", "partition=1", code=1)
    assert "option partition: found 2 images, expected one" in found


def begins_outside(disk: bytearray) -> None:
    """Move the second partition behind the end of the disk."""
    disk[470:474] = (1 << 31).to_bytes(4, "little")


def ends_outside(disk: bytearray) -> None:
    """Let the second partition end after the disk."""
    disk[474:478] = (1 << 31).to_bytes(4, "little")


def loop(disk: bytearray) -> None:
    """Let the first extended boot record lead to itself."""
    record = 8192 * SECTOR
    disk[record + 470 : record + 474] = bytes(4)


@pytest.mark.parametrize(
    ("damage", "line", "numbers"),
    [
        (begins_outside, "partition 2: begins outside of the disk, at sector 2147483648",
         {1, 5, 6}),
        (ends_outside, "partition 2: ends after the end of the disk, is cut there", {1, 2, 5, 6}),
        (loop, "extended partition: the chain of records leads to a loop", {1, 2, 5}),
    ],
)  # fmt: skip
def test_a_hostile_table_gives_one_line(
    damage: Callable[[bytearray], None], line: str, numbers: set[int], tmp_path: Path
) -> None:
    """What can be used of a damaged table is shown, and one line says what is wrong."""
    make_image(tmp_path)
    raw, image = tmp_path / "vm.raw", tmp_path / "vm.qed"
    content = bytearray(raw.read_bytes())
    damage(content)
    raw.write_bytes(content)
    qemu.convert(raw, image, source_format="raw", target_format="qed")
    with front(image, "-o", "ro,partitions", tmp_path / "mnt") as mount:
        log = mount.read_line()
        assert f"vm.qed: partition table: {line}" in log
        assert set(partitions_in(tmp_path / "mnt")) == numbers
