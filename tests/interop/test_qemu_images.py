"""Images that QEMU made, read and written by qedfuse, and the other way round."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from qedfuse.disk.creation.create import create_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import HeaderError, QedError
from tests.support import qemu
from tests.support.disks import (
    build_image,
    difference,
    guest_bytes,
    header_of,
    inspect_image,
    pattern,
)
from tests.support.programs import qedimg

WRITABLE = OpenOptions(writable=True)

GEOMETRIES = [
    # cluster size, table size; QEMU opens no image with a table of one cluster
    (4096, 2),
    (4096, 16),
    (8192, 4),
    (65536, 2),
    (65536, 4),
    (1 << 20, 2),
    (2 << 20, 4),
]


def qedimg_output(*words: str) -> str:
    """Run a command of qedimg that must succeed without a message; return its output."""
    code, output, complaint = qedimg(*words)
    assert (code, complaint) == (0, ""), words
    return output


@dataclass
class Mirror:
    """A disk that both programs write to, and its expected content."""

    path: Path
    model: bytearray
    choice: random.Random

    def ranges(self, count: int) -> list[tuple[int, int, int]]:
        """Choose ranges to write: start and length in bytes, whole sectors, and a byte value."""
        result = []
        for _ in range(count):
            start = self.choice.randrange(len(self.model) // 512) * 512
            length = self.choice.choice((512, 4096, 65536, 200_704))
            result.append(
                (start, min(length, len(self.model) - start), self.choice.randrange(1, 256))
            )
        return result

    def by_qemu(self, count: int = 6, *, zeros: bool = True) -> None:
        """Write with qemu-io, some of it as zeros."""
        commands = []
        for start, length, byte in self.ranges(count):
            zero = zeros and byte % 3 == 0
            commands.append(f"write {'-z' if zero else f'-P {byte}'} {start} {length}")
            self.model[start : start + length] = bytes([0 if zero else byte]) * length
        qemu.io(self.path, *commands)

    async def by_qedfuse(self, count: int = 6, *, shift: int = 0) -> None:
        """Write with qedfuse; ``shift`` moves the ranges off the sector boundaries."""
        async with open_disk(str(self.path), WRITABLE) as disk:
            for start, length, byte in self.ranges(count):
                at = min(start + shift, len(self.model) - 1)
                data = bytes([byte]) * min(length, len(self.model) - at)
                assert await disk.write(at, data) == len(data)
                self.model[at : at + len(data)] = data
                if byte % 4 == 0:
                    await disk.flush()

    async def check(self, *, leaks: bool = False) -> None:
        """Assert that both programs read the expected content and find nothing wrong."""
        async with open_disk(str(self.path)) as disk:
            assert disk.size == len(self.model)
            assert not disk.header.need_check
            # Also in ranges that begin and end within clusters.
            assert difference(await disk.read(0, disk.size), self.model) is None
            for start in range(777, len(self.model), max(1, len(self.model) // 7)):
                got = await disk.read(start, 70_001)
                assert difference(got, self.model[start : start + 70_001]) is None
        found = inspect_image(self.path.read_bytes())
        assert found.errors == ()
        assert leaks or found.leaks == 0
        assert qemu.check(self.path).errors == 0
        raw = self.path.with_suffix(".raw")
        raw.write_bytes(self.model)
        assert qemu.compare(self.path, raw)
        raw.unlink()


def mirror(path: Path, size: int, seed: int) -> Mirror:
    """Begin with a disk of zeros."""
    return Mirror(path, bytearray(size), random.Random(seed))


@pytest.mark.parametrize(("cluster_size", "table_size"), GEOMETRIES)
@pytest.mark.parametrize("size", [3 << 20, (9 << 20) + 512 * 7])
async def test_images_of_qemu(
    tmp_path: Path, cluster_size: int, table_size: int, size: int
) -> None:
    """QEMU's images read back byte for byte, and qedfuse adds to them without a new leak."""
    made = mirror(tmp_path / "made.qed", size, cluster_size)
    qemu.create(made.path, size, cluster_size=cluster_size, table_size=table_size)
    await made.check()
    made.by_qemu(10)
    await made.check(leaks=True)
    leaks = inspect_image(made.path.read_bytes()).leaks
    for cycle in range(3):
        await made.by_qedfuse(shift=cycle * 131)
        made.by_qemu(4)
    await made.check(leaks=True)
    assert inspect_image(made.path.read_bytes()).leaks == leaks


@pytest.mark.parametrize(("cluster_size", "table_size"), GEOMETRIES)
async def test_images_of_qedfuse(tmp_path: Path, cluster_size: int, table_size: int) -> None:
    """Images of qedfuse are clean and equal for QEMU, before and after QEMU's writes."""
    size = (7 << 20) + 512
    made = mirror(tmp_path / "made.qed", size, cluster_size + 1)
    await create_image(str(made.path), size, cluster_size=cluster_size, table_size=table_size)
    await made.check()
    for cycle in range(3):
        await made.by_qedfuse(8, shift=cycle * 77)
        await made.check()
        assert qemu.check(made.path).code == 0
        made.by_qemu(4)
        await made.check()


@pytest.mark.parametrize("size", [512, 1024, 65536 - 512, 65536, 65536 + 512, 1 << 20, 0])
async def test_odd_sizes(tmp_path: Path, size: int) -> None:
    """Disks that end within a cluster, or have no sector at all, work with both programs."""
    made = mirror(tmp_path / "made.qed", size, size)
    qemu.create(made.path, size)
    if size:
        made.by_qemu(2)
        await made.by_qedfuse(2, shift=5)
    await made.check()


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("base_size", [1 << 20, (5 << 20) + 512])
async def test_overlay_on_a_raw_base(tmp_path: Path, base_size: int, *, probed: bool) -> None:
    """Overlays on raw bases work for bases shorter or longer, with and without NO_PROBE."""
    size = 3 << 20
    base = tmp_path / "base.img"
    base.write_bytes(pattern(base_size, 3))
    made = mirror(tmp_path / "top.qed", size, 7)
    if probed:
        await create_image(str(made.path), size, backing="base.img")
    else:
        qemu.create(made.path, size, backing="base.img", backing_format="raw")
    assert header_of(made.path.read_bytes()[:64]).backing_is_raw != probed
    made.model[:] = base.read_bytes()[:size].ljust(size, b"\0")
    await made.check()
    # No zero writes by QEMU: its small writes into zero clusters bring the base back.
    made.by_qemu(5, zeros=False)
    for cycle in range(2):
        await made.by_qedfuse(4, shift=cycle * 99)
        made.by_qemu(3, zeros=False)
    await made.check(leaks=True)
    assert base.read_bytes() == pattern(base_size, 3)


async def test_raw_base_with_a_header_inside(tmp_path: Path) -> None:
    """A base that QEMU marks as raw is read as raw, even if it begins like an image."""
    inside = bytes(build_image(1 << 20, {3: b"inner"}, backing=b"/etc/passwd"))
    (tmp_path / "base.img").write_bytes(inside)
    made = mirror(tmp_path / "top.qed", 1 << 20, 1)
    qemu.create(made.path, len(made.model), backing="base.img", backing_format="raw")
    made.model[: len(inside)] = inside
    await made.check()
    await made.by_qedfuse(3)
    await made.check()


async def test_chain_of_qemu(tmp_path: Path) -> None:
    """A chain of QED over QED over raw works if a layer is shorter or longer than its base."""
    (tmp_path / "bottom.img").write_bytes(pattern(2_000_000 // 512 * 512, 1))
    middle = mirror(tmp_path / "middle.qed", 3 << 20, 2)
    qemu.create(
        middle.path,
        len(middle.model),
        cluster_size=4096,
        table_size=2,
        backing="bottom.img",
        backing_format="raw",
    )
    middle.model[:1_999_872] = pattern(1_999_872, 1)
    middle.by_qemu(6, zeros=False)
    await middle.by_qedfuse(4, shift=17)
    await middle.check(leaks=True)
    top = mirror(tmp_path / "top.qed", 4 << 20, 3)
    qemu.create(top.path, len(top.model), backing="middle.qed", backing_format="qed")
    top.model[: len(middle.model)] = middle.model
    await top.check()
    for cycle in range(3):
        await top.by_qedfuse(4, shift=cycle * 301)
        top.by_qemu(3, zeros=False)
    await top.check(leaks=True)
    await middle.check(leaks=True)


@pytest.mark.parametrize("length", [1024, 1500, 4000])
async def test_an_overlay_of_qemu_with_a_long_backing_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Commands read such an overlay; after a rebase to a short or long name QEMU reads it."""
    monkeypatch.chdir(tmp_path)  # short paths, because the host's limit is 4095 bytes
    content = pattern(1 << 20, 9)
    (tmp_path / "base.img").write_bytes(content)
    name = "./" * ((length - 8) // 2) + "base.img"
    assert len(name) == length
    made = mirror(Path("top.qed"), 1 << 20, length)
    qemu.create(made.path, len(made.model), backing=name, backing_format="raw")
    made.model[:] = content
    made.by_qemu(2, zeros=False)
    await made.check()
    info = json.loads(qedimg_output("info", "--output=json", "top.qed"))
    assert info["backing-filename"] == name == qemu.info("top.qed")["backing-filename"]
    assert info["safety"]["safe-to-mount"]
    assert info["problems"] == []
    extents = json.loads(qedimg_output("map", "--output=json", "top.qed"))
    assert sum(extent["length"] for extent in extents if extent["depth"] == 1) > 0
    assert extents[-1]["start"] + extents[-1]["length"] == len(made.model)
    qedimg_output("check", "top.qed")
    await made.by_qedfuse(2)
    for new in ("./base.img", "./" * 300 + "base.img", "./" * 507 + "/base.img", "base.img"):
        qedimg_output("rebase", "-q", "-u", "-F", "raw", "-b", new, "top.qed")
        assert qemu.info("top.qed")["backing-filename"] == new
        await made.check()


async def test_zero_clusters_of_qemu_on_an_overlay(tmp_path: Path) -> None:
    """A small write of qedfuse into a zero cluster of QEMU leaves zeros around it."""
    (tmp_path / "base.img").write_bytes(b"\xaa" * (1 << 20))
    made = mirror(tmp_path / "top.qed", 1 << 20, 1)
    qemu.create(made.path, len(made.model), backing="base.img", backing_format="raw")
    made.model[:] = b"\xaa" * (1 << 20)
    qemu.io(made.path, "write -z 0 128k", "write -z 512k 64k")
    made.model[: 128 << 10] = bytes(128 << 10)
    made.model[512 << 10 : 576 << 10] = bytes(64 << 10)
    await made.check()
    async with open_disk(str(made.path), WRITABLE) as disk:
        await disk.write(4096, b"x" * 4096)
        await disk.write((576 << 10) - 100, b"y" * 200)
    made.model[4096:8192] = b"x" * 4096
    made.model[(576 << 10) - 100 : (576 << 10) + 100] = b"y" * 200
    await made.check()


async def test_growing_what_qemu_made(tmp_path: Path) -> None:
    """An overlay over a longer base, which QEMU cannot grow, is grown; QEMU reads zeros there."""
    (tmp_path / "base.img").write_bytes(b"\xaa" * (4 << 20))
    made = mirror(tmp_path / "top.qed", (1 << 20) + 512, 1)
    qemu.create(made.path, len(made.model), backing="base.img", backing_format="raw")
    made.model[:] = b"\xaa" * len(made.model)
    made.by_qemu(2, zeros=False)
    for size in ((1 << 20) + 2048, (3 << 20) + 1024, 6 << 20):
        async with open_disk(str(made.path), WRITABLE) as disk:
            await disk.grow(size)
        made.model.extend(bytes(size - len(made.model)))
        await made.check()
    await made.by_qedfuse(4)
    await made.check()


async def test_growing_alternately(tmp_path: Path) -> None:
    """A disk without a base can be grown by both programs alternately."""
    made = mirror(tmp_path / "made.qed", 512 * 3, 1)
    qemu.create(made.path, len(made.model), cluster_size=4096, table_size=2)
    for cycle in range(1, 7):
        size = 512 * 3 + cycle * (cycle % 3 + 1) * 300 * 512
        if size <= len(made.model):
            continue
        if cycle % 2:
            qemu.run("qemu-img", "resize", "-q", "-f", "qed", made.path, str(size))
        else:
            async with open_disk(str(made.path), WRITABLE) as disk:
                await disk.grow(size)
        made.model.extend(bytes(size - len(made.model)))
        await made.by_qedfuse(2)
        made.by_qemu(2)
        await made.check(leaks=True)


async def test_converted_disk(tmp_path: Path) -> None:
    """Both programs read what qemu-img convert wrote, and QEMU reads the copy by qedfuse."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(pattern(3 << 20, 1) + bytes(2 << 20) + pattern(700 * 512, 2))
    path = qemu.convert(raw, tmp_path / "disk.qed", source_format="raw", target_format="qed")
    async with open_disk(str(path)) as disk:
        assert difference(await disk.read(0, disk.size), raw.read_bytes()) is None
    copy = tmp_path / "copy.qed"
    await create_image(str(copy), raw.stat().st_size)
    async with open_disk(str(copy), WRITABLE) as disk:
        await disk.write(0, raw.read_bytes())
    assert qemu.compare(copy, path, second_format="qed")
    assert difference(qemu.content(copy), raw.read_bytes()) is None
    assert qemu.check(copy).code == 0


async def test_an_unclean_image_is_checked_by_qemu(tmp_path: Path) -> None:
    """QEMU checks and opens an image that qedfuse left with NEED_CHECK."""
    path = tmp_path / "dirty.qed"
    clusters = {number: pattern(65536, number) for number in range(5)}
    image = build_image(1 << 20, clusters, cluster_size=65536, table_size=4, features=2)
    path.write_bytes(image)
    qemu.io(path, "write -P 1 600k 4k")
    assert not header_of(path.read_bytes()).need_check
    async with open_disk(str(path), WRITABLE) as disk:
        got = await disk.read(0, 5 * 65536)
        await disk.write(0, b"ours")
    assert difference(got, guest_bytes(image)[: 5 * 65536]) is None
    assert not header_of(path.read_bytes()).need_check


@pytest.mark.parametrize("field", ["cluster_size", "table_size", "size"])
async def test_both_refuse_the_same_headers(tmp_path: Path, field: str) -> None:
    """A header that QEMU refuses is refused with the name of the field."""
    image = build_image(1 << 20, {0: b"a"}, cluster_size=65536, table_size=4)
    offset, value = {"cluster_size": (4, 65537), "table_size": (8, 3), "size": (48, 513)}[field]
    image[offset : offset + 4] = value.to_bytes(4, "little")
    path = tmp_path / "bad.qed"
    path.write_bytes(image)
    with pytest.raises(qemu.QemuError):
        qemu.check(path)
    with pytest.raises(HeaderError, match=f"found {value}") as caught:
        async with open_disk(str(path), OpenOptions(backing=BackingPolicy(mode="none"))):
            pass
    assert isinstance(caught.value, QedError)
    assert path.read_bytes() == image
