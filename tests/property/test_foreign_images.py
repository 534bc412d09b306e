"""Images as two other programs write them: PCE's pce-img and Oracle VirtualBox.

pce-img appends tables and clusters in the order of the writes, with tables of two clusters
and clusters of 4 KiB to 1 MiB.  VirtualBox grows the file without NEED_CHECK and writes the
whole L1 table again each time, so a crash leaves leaks, entries past the file's end and
missing tables, in an image that is marked clean; its files end at the end of the last write.
The data that such an image still holds is readable, is not changed by requests beside it, and
survives a repair.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.check.inspector import inspect_image as inspector
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import CorruptImageError, HeaderError
from qedfuse.ondisk.constants import MAX_BACKING_NAME, SECTOR, Feature
from qedfuse.ondisk.geometry import Geometry
from qedfuse.ondisk.header import Header, build_header
from qedfuse.tools.inspection.info import describe
from qedfuse.tools.repair.imagecheck import repair
from tests.support.disks import header_of, inspect_image, pattern
from tests.support.share import share

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qedfuse.disk.disk import Disk

WRITABLE: Final = OpenOptions(writable=True, compact="off")


@dataclass
class Image:
    """An image that is being built, and the expected content of its disk.

    Attributes:
        header: The header.
        content: The bytes of the file.
        model: The content of each guest cluster that is not zeros.
        lost: The guest clusters whose bytes are not, or not all, in the file, with the content
            that a repair gives them.
    """

    header: Header
    content: bytearray
    model: dict[int, bytes] = field(default_factory=dict)
    lost: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def new(cls, cluster_size: int, table_size: int, clusters: int, backing: bytes = b"") -> Image:
        """Make an empty image of a number of guest clusters."""
        header = Header(
            cluster_size=cluster_size,
            table_size=table_size,
            header_size=1,
            features=int(Feature.BACKING_FILE) if backing else 0,
            compat_features=0,
            autoclear_features=0,
            l1_table_offset=cluster_size,
            image_size=clusters * cluster_size,
            backing_filename_offset=64 if backing else 0,
            backing_filename_size=len(backing),
        )
        content = bytearray(header.l1_end)
        content[:64] = build_header(header)
        content[64 : 64 + len(backing)] = backing
        return cls(header, content)

    @property
    def geometry(self) -> Geometry:
        """The geometry of the image."""
        return self.header.geometry

    def put(self, offset: int, value: int) -> None:
        """Write a table entry at a file offset."""
        self.content[offset : offset + 8] = value.to_bytes(8, "little")

    def entry(self, cluster: int) -> int:
        """Return the file offset of a guest cluster's L2 entry; append its table if missing."""
        l1_index, l2_index = divmod(cluster, self.geometry.entries)
        l1_entry = self.header.l1_table_offset + 8 * l1_index
        table = int.from_bytes(self.content[l1_entry : l1_entry + 8], "little")
        if not table:
            table = len(self.content)
            self.content.extend(bytes(self.geometry.table_bytes))
            self.put(l1_entry, table)
        return table + 8 * l2_index

    def append(self, cluster: int) -> None:
        """Allocate a guest cluster at the end of the file, as both programs do."""
        entry = self.entry(cluster)
        self.put(entry, len(self.content))
        data = pattern(self.header.cluster_size, cluster)
        self.content.extend(data)
        self.model[cluster] = data


def draw_clusters(chance: random.Random, image: Image) -> list[int]:
    """Choose guest clusters, some of them near the beginning of the disk."""
    clusters = image.header.image_size // image.header.cluster_size
    near = range(min(clusters, 12))
    count = 3 if image.header.cluster_size > 1 << 16 else 12
    found = {chance.choice((chance.choice(near), chance.randrange(clusters))) for _ in range(count)}
    return chance.sample(sorted(found), len(found))


def pce(chance: random.Random) -> Image:
    """Draw an image as pce-img writes it."""
    bits = chance.randrange(12, 21)
    entries = Geometry(1 << bits, 2).entries
    image = Image.new(1 << bits, 2, chance.choice((9, entries - 1, 2 * entries + 7)))
    for cluster in draw_clusters(chance, image):
        image.append(cluster)
    return image


def virtualbox(chance: random.Random) -> Image:
    """Draw an image as VirtualBox leaves it, after a clean exit or a crash."""
    image = Image.new(1 << chance.choice((12, 16)), chance.choice((1, 4)), 2500)
    for cluster in draw_clusters(chance, image):
        image.append(cluster)
        if chance.random() < 0.2:
            # The file had grown before the crash, and no entry refers to that cluster.
            image.content.extend(pattern(image.header.cluster_size, 99))
    unused = [n for n in range(60) if n not in image.model]
    size = image.header.cluster_size
    match chance.randrange(5):
        case 0:  # Its last write did not fill the cluster.
            cluster = chance.choice(unused)
            image.append(cluster)
            kept = chance.choice((SECTOR, size - SECTOR))
            del image.content[len(image.content) - size + kept :]
            image.lost[cluster] = image.model[cluster][:kept].ljust(size, b"\0")
        case 1:  # Entries that were written before the clusters that they point to.
            image.lost |= dict.fromkeys(chance.sample(unused, 3), bytes(size))
            entries = [image.entry(cluster) for cluster in sorted(image.lost)]
            for number, entry in enumerate(entries):
                image.put(entry, len(image.content) + number * size)
        case 2:  # The L1 table was written before a table.
            last = image.geometry.entries - 1
            image.put(image.header.l1_table_offset + 8 * last, len(image.content) & -size)
        case 3:  # Bytes after the last cluster that no entry refers to.
            image.content.extend(pattern(chance.randrange(1, size), 7))
        case _:
            pass
    for cluster in image.lost:
        image.model.pop(cluster, None)
    return image


async def compare(disk: Disk, image: Image, chance: random.Random) -> None:
    """Compare the disk with the model; a read of a lost cluster must fail."""
    size = image.header.cluster_size
    others = {chance.randrange(disk.size // size) for _ in range(5)}
    for cluster in image.model.keys() | others - image.lost.keys():
        expected = image.model.get(cluster, bytes(size))
        assert await disk.read(cluster * size, size) == expected, cluster
    for cluster in image.lost:
        with pytest.raises(CorruptImageError):
            await disk.read(cluster * size, size)


async def change(disk: Disk, image: Image, chance: random.Random) -> None:
    """Write, discard and flush beside the lost clusters; update the model."""
    size = image.header.cluster_size
    clusters = disk.size // size
    for step in range(25 if size <= 1 << 16 else 8):
        cluster = chance.choice((chance.randrange(min(30, clusters)), chance.randrange(clusters)))
        if cluster in image.lost:
            with pytest.raises(CorruptImageError):
                await disk.write(cluster * size, b"x")
        elif chance.random() < 0.6:
            start, data = chance.choice((0, 100)), pattern(700, step)
            await disk.write(cluster * size + start, data)
            old = bytearray(image.model.get(cluster, bytes(size)))
            old[start : start + len(data)] = data
            image.model[cluster] = bytes(old)
        else:
            await disk.discard(cluster * size, size)
            image.model.pop(cluster, None)
        if chance.random() < 0.2:
            await disk.flush()


async def stored(path: Path, image: Image, cluster: int) -> bytes:
    """Read a guest cluster."""
    size = image.header.cluster_size
    async with open_disk(str(path)) as disk:
        return bytes(await disk.read(cluster * size, size))


@pytest.mark.parametrize("seed", range(share(6, of=16)))
@pytest.mark.parametrize("draw", [pce, virtualbox])
async def test_images_of_other_programs(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    draw: Callable[[random.Random], Image],
    seed: int,
) -> None:
    """The data of a foreign image survives reads, writes, a repair if needed, and more writes."""
    # Other tests cover the log messages about damage and leaks.
    caplog.set_level(logging.CRITICAL, "qedfuse")
    chance = random.Random(f"{draw.__name__} {seed}")
    image = draw(chance)
    path = tmp_path / "foreign.qed"
    path.write_bytes(image.content)
    damage = bool(inspect_image(image.content).errors)
    async with open_disk(str(path)) as disk:
        await compare(disk, image, chance)
    assert path.read_bytes() == image.content
    if not damage or not len(image.content) % image.header.cluster_size:
        # The image is marked clean, so only the scan finds the damage.
        async with open_disk(str(path), WRITABLE, inspector=inspector) as disk:
            await disk.ensure_scanned()
            await compare(disk, image, chance)
            await change(disk, image, chance)
            await compare(disk, image, chance)
            assert disk.damaged == damage
        assert header_of(path.read_bytes()).need_check == damage
    if damage:
        assert draw is virtualbox
        before = path.read_bytes()
        with pytest.raises(CorruptImageError, match="not opened for writing"):
            async with open_disk(str(path), WRITABLE, inspector=inspector):
                pass
        assert path.read_bytes() == before
        result = await repair(str(path), "all", force=True)
        assert result.after.errors == 0
        if len(image.content) % image.header.cluster_size:
            image.model |= image.lost
        else:
            # The file grew over the targets of these entries, and a repair gives each owner of a
            # cluster a copy, so their content is arbitrary.
            image.model |= {number: await stored(path, image, number) for number in image.lost}
        image.lost.clear()
    assert inspect_image(path.read_bytes()).errors == ()
    async with open_disk(str(path), WRITABLE, inspector=inspector) as disk:
        await change(disk, image, chance)
        await compare(disk, image, chance)
    assert not header_of(path.read_bytes()).need_check
    assert inspect_image(path.read_bytes()).errors == ()


def test_drawn_images_cover_all_kinds() -> None:
    """Of the 16 images of each program a known number has each kind of damage or size."""
    drawn = [virtualbox(random.Random(f"virtualbox {seed}")) for seed in range(16)]
    assert sum(bool(image.lost) for image in drawn) == 9
    assert sum(bool(len(one.content) % one.header.cluster_size) for one in drawn) == 10
    assert sum(inspect_image(image.content).leaks > 0 for image in drawn) == 16
    made = [pce(random.Random(f"pce {seed}")) for seed in range(16)]
    assert len({image.header.cluster_size for image in made}) == 8


@pytest.mark.parametrize("length", [1023, 1024, MAX_BACKING_NAME, MAX_BACKING_NAME + 1])
async def test_a_backing_name_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """A backing name of the maximum length is followed; a longer one is refused in one line."""
    monkeypatch.chdir(tmp_path)  # short paths, because the host's limit is 4095 bytes
    name = b"./" * ((length - 8) // 2) + b"/" * (length % 2) + b"base.img"
    assert len(name) == length
    (tmp_path / "base.img").write_bytes(pattern(4096, 5))
    image = Image.new(8192, 1, 4, name)
    (tmp_path / "top.qed").write_bytes(image.content)
    found = describe("top.qed").qed
    assert found is not None
    if length <= MAX_BACKING_NAME:
        options = OpenOptions(backing=BackingPolicy(format="raw"))
        async with open_disk("top.qed", options) as disk:
            assert await disk.read(0, 4096) == pattern(4096, 5)
        assert found.backing is not None
        assert found.backing.name == name.decode()
        assert found.mountable
        return
    expected = f"header field backing_filename_size: found {length}, expected at most 4095"
    with pytest.raises(HeaderError, match=expected):
        async with open_disk("top.qed"):
            pass
    assert not found.mountable
    assert any(expected in problem.message for problem in found.problems)
