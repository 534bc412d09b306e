"""Whole images: tables, free lists and data, for every reader of them and for the repair.

An input is the encoding of a file (`tests.fuzz.targets.patches`) after one byte: the lowest bit of
this byte makes the checksums of a free list right, so that the numbers in the list are read too.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from qedfuse.check.checker import check_image
from qedfuse.check.fastcheck import fast_check
from qedfuse.check.repair import repair_image
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import CorruptImageError, ImageError, NeedsCheckError
from qedfuse.hostio.imagefile import read_header
from qedfuse.tools.inspection.fastmap import open_fast_map
from qedfuse.tools.inspection.info import describe
from qedfuse.tools.inspection.mapping import map_image
from tests.fuzz.targets.drawn import Drawn
from tests.fuzz.targets.patches import decode, encode
from tests.fuzz.targets.scratch import put, scratch
from tests.fuzz.targets.target import Target, assert_line
from tests.support import qemu
from tests.support.disks import WRITABLE, build_image, guest_bytes, header_of, inspect_image, opened
from tests.support.freelists import put_list
from tests.support.hostfiles import MemoryFile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qedfuse.check.findings import CheckReport
    from qedfuse.ondisk.header import Header

BASE: Final = b"\xbb" * (1 << 16)
"""The base below an image that names one; the disk may be longer than the base."""
_MAX_READ_BYTES: Final = 1 << 21
"""How many bytes are read of a disk; the tables of most inputs describe no more."""
_STEP_BYTES: Final = 1 << 19
_DESCRIPTOR: Final = 3584
_DESCRIPTOR_CRC: Final = _DESCRIPTOR + 508
_LIST_CRC: Final = _DESCRIPTOR + 12
_QEMU_MAX_CLUSTER_BYTES: Final = 1 << 20
_QEMU_MAX_DISK_BYTES: Final = 1 << 24


def file_of(data: bytes) -> bytearray:
    """Return the file that an input describes."""
    drawn = Drawn(data)
    flags = drawn.number()
    content = decode(drawn)
    if flags & 1:
        correct_checksums(content)
    return content


def correct_checksums(content: bytearray) -> None:
    """Make the checksums of a free list right, as far as its clusters can be found."""
    if len(content) < _DESCRIPTOR_CRC + 4:
        return
    size = max(int.from_bytes(content[4:8], "little"), 4096)
    first = int.from_bytes(content[_DESCRIPTOR + 16 : _DESCRIPTOR + 24], "little")
    offset, body, seen = first, bytearray(), set[int]()
    while offset and offset + size <= len(content) and offset not in seen:
        seen.add(offset)
        following = int.from_bytes(content[offset + 8 : offset + 16], "little")
        count = int.from_bytes(content[offset + 16 : offset + 20], "little")
        runs = content[offset + 32 : offset + min(size, 32 + 16 * count)]
        content[offset + 20 : offset + 24] = bytes(4)
        crc = zlib.crc32(runs, zlib.crc32(content[offset : offset + 32]))
        content[offset + 20 : offset + 24] = crc.to_bytes(4, "little")
        body += runs
        offset = following
    content[_LIST_CRC : _LIST_CRC + 4] = zlib.crc32(body).to_bytes(4, "little")
    crc = zlib.crc32(content[_DESCRIPTOR:_DESCRIPTOR_CRC])
    content[_DESCRIPTOR_CRC : _DESCRIPTOR_CRC + 4] = crc.to_bytes(4, "little")


class _Part(NamedTuple):
    """A range of a disk; ``content`` is None if the range cannot be read."""

    start: int
    length: int
    content: bytes | None


def check(data: bytes) -> None:
    """Let every reader read an image, and the repair repair it."""
    trio.run(_check, file_of(data))


async def _check(content: bytearray) -> None:
    """Do what `check` does."""
    path = put(scratch("image") / "image.qed", content)
    file = MemoryFile(content, name=path, writable=False)
    try:
        header = await read_header(file)
    except ImageError as error:
        assert_line(error)
        await _check_tools(path, content, None)
        return
    try:
        report = await check_image(file, header)
    except NeedsCheckError as error:
        assert_line(error)
        return
    for finding in report.findings:
        assert finding.message.isprintable()
    before = await _read_all(content, header)
    _compare_with_oracle(content, header, report, before)
    assert file.content == content, "a read-only image has changed"
    await _check_tools(path, content, report)
    await _repair(content, header, report, before)


async def _read_all(content: bytearray, header: Header) -> list[_Part]:
    """Read a disk with a reader that must not change the image; return what each part holds."""
    file = MemoryFile(content, writable=False)
    bases = [BASE] if header.has_backing else []
    parts = []
    async with opened(file, bases, OpenOptions()) as disk:
        end = min(disk.size, _MAX_READ_BYTES)
        cluster = header.cluster_size
        for start in range(0, end, max(cluster, _STEP_BYTES)):
            length = min(max(cluster, _STEP_BYTES), end - start)
            try:
                parts.append(_Part(start, length, bytes(await disk.read(start, length))))
            except CorruptImageError as error:
                assert_line(error)
                for at in range(start, start + length, cluster):
                    rest = min(cluster, start + length - at)
                    try:
                        parts.append(_Part(at, rest, bytes(await disk.read(at, rest))))
                    except CorruptImageError:
                        parts.append(_Part(at, rest, None))
    assert file.content == content, "a reader has changed the image"
    return parts


def _compare_with_oracle(
    content: bytearray, header: Header, report: CheckReport, parts: Iterable[_Part]
) -> None:
    """Assert what an independent reader of the tables says of a sound image."""
    if report.table_errors or len(content) % header.cluster_size:
        return
    inspected = inspect_image(content)
    assert not inspected.errors, inspected.errors
    if header.image_size <= _MAX_READ_BYTES:
        disk = guest_bytes(content, BASE if header.has_backing else b"")
        for part in parts:
            assert part.content == disk[part.start : part.start + part.length]


async def _check_tools(path: str, content: bytearray, report: CheckReport | None) -> None:
    """Let the tools that open a path describe an image, and compare them with each other."""
    try:
        described = describe(path)
        problems = described.qed.problems if described.qed else ()
        assert all(problem.message.isprintable() for problem in problems)
    except ImageError as error:
        assert_line(error)
    fast = fast_check(path)
    if fast is not None:
        assert fast[2] == report, "the fast check differs from the check"
    with open_fast_map(path) as fast_map:
        if fast_map is not None:
            for line in fast_map.lines(as_json=True, name=""):
                assert line.isprintable() or "\n" in line
            assert 0 <= fast_map.reached <= fast_map.size
    if report is None:
        return
    if not header_of(content).has_backing:
        end = 0
        for entry in await map_image(path):
            assert entry.start == end
            end += entry.length
        assert end == header_of(content).image_size
    assert _content_of(path) == content, "a reader has changed a file"


def _content_of(path: str) -> bytes:
    """Return the content of a file."""
    return Path(path).read_bytes()


async def _repair(
    content: bytearray, header: Header, report: CheckReport, before: Iterable[_Part]
) -> None:
    """Repair an image; no error may be left, and nothing may be lost that is not reported."""
    file = MemoryFile(content)
    repaired = await repair_image(file, header)
    assert repaired.after.errors == 0, "the repair has left errors"
    fresh = MemoryFile(file.content, writable=False)
    new_header = await read_header(fresh)
    again = await check_image(fresh, new_header)
    assert again.errors == 0, "a check after the repair finds errors"
    assert not new_header.need_check
    if not report.errors and not header.need_check:
        assert file.content == content, "the repair has changed a sound image"
    lost = [(item.start, item.start + item.length) for item in repaired.lost]
    after = {part.start: part for part in await _read_all(file.content, new_header)}
    assert all(part.content is not None for part in after.values())
    disk = b"".join(part.content or b"" for _, part in sorted(after.items()))
    for start, length, old in before:
        if old is None or any(first < start + length and start < end for first, end in lost):
            continue
        assert disk[start : start + length] == old, f"the repair has changed {start}+{length}"
    await _write(file.content, new_header, disk)


async def _write(content: bytearray, header: Header, disk: bytes) -> None:
    """Write to a sound image; only what was written may change, and the image stays sound."""
    if not disk or len(content) % header.cluster_size or header.cluster_size > _STEP_BYTES:
        return
    file = MemoryFile(content)
    bases = [BASE] if header.has_backing else []
    writes = [(0, b"w" * 700), (len(disk) // 3 & ~511, b"x" * 5000), (len(disk) - 512, b"y" * 512)]
    expected, cluster = bytearray(disk), header.cluster_size
    async with opened(file, bases, WRITABLE) as open_disk:
        for start, new in writes:
            part = new[: len(disk) - start]
            assert await open_disk.write(start, part) == len(part)
            expected[start : start + len(part)] = part
        start = len(disk) // 2 // cluster * cluster
        await open_disk.discard(start, cluster)
        expected[start : start + cluster] = bytes(len(expected[start : start + cluster]))
        await open_disk.flush()
    fresh = MemoryFile(file.content, writable=False)
    new_header = await read_header(fresh)
    assert (await check_image(fresh, new_header)).errors == 0, "writes have damaged the image"
    parts = await _read_all(file.content, new_header)
    read = b"".join(part.content or b"" for part in parts)
    assert read == expected, "other bytes than the written ones have changed"


def ask_qemu(data: bytes) -> bool:
    """Repair an image; QEMU must find no error in the result, and read the same bytes."""
    content = file_of(data)
    try:
        header = trio.run(read_header, MemoryFile(content))
    except ImageError:
        return False
    file = MemoryFile(content)
    trio.run(repair_image, file, header)
    header = trio.run(read_header, file)
    if (
        header.has_backing
        or header.has_free_list
        or header.table_size == 1  # refused by QEMU (docs/qemu-differences.md)
        or header.cluster_size > _QEMU_MAX_CLUSTER_BYTES
        or not 0 < header.image_size <= _QEMU_MAX_DISK_BYTES
    ):
        return False
    path = put(scratch("image") / "repaired.qed", file.content)
    assert qemu.check(path).errors == 0, "QEMU finds errors after the repair"
    read = b"".join(part.content or b"" for part in trio.run(_read_all, file.content, header))
    assert qemu.content(path)[:_MAX_READ_BYTES] == read, "QEMU reads other bytes"
    return True


def seeds() -> list[bytes]:
    """Return sound images, images with each kind of damage, and images with a free list."""
    data: dict[int, bytes | int] = {0: b"a" * 100, 1: 1, 3: b"c" * 8, 513: b"d" * 16}
    images = [
        build_image(4 << 20, data),
        build_image(4 << 20, data, table_size=2, header_size=2),
        build_image(1 << 20, {0: b"a", 5: b"b", 6: 1, 9: b"x"}, table_size=4, features=2),
        build_image(1 << 20, {0: b"a", 2: 1}, backing=b"base.raw", features=4),
        build_image(1536, {0: b"z"}, table_size=2),
        build_image(4 << 20, {0: b"a", 1: 1 << 40, 2: 8192, 3: 4097, 600: b"e"}),
    ]
    shared = build_image(4 << 20, data)
    shared[4096 + 8 : 4096 + 16] = shared[4096:4104]  # two L1 entries share a table
    unused = build_image(4 << 20, data)
    unused += bytes(3 * 4096) + b"q" * 4096
    listed = build_image(4 << 20, {0: b"a", 1: b"b", 2: b"c", 3: b"d", 4: b"e"})
    table = 8192
    listed[table + 8 : table + 16] = listed[table + 24 : table + 32] = bytes(8)
    put_list(listed)
    return [
        *(b"\0" + encode(image) for image in (*images, shared, unused)),
        b"\1" + encode(listed),
    ]


TOKENS: Final = (
    *(number.to_bytes(8, "little") for number in (1, 4096, 8192, 12288, 16384, 20480, 24576)),
    *(number.to_bytes(8, "little") for number in ((1 << 63) - 4096, (1 << 64) - 4096)),
)

TARGET: Final = Target(check, seeds, TOKENS, ask_peer=ask_qemu)
