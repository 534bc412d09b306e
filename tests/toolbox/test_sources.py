"""Sources of a copy: any chain, raw files and devices; and files that cannot be a source."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
import trio

from qedfuse.cli.qedimg.main import main
from qedfuse.disk.creation.create import create_image
from qedfuse.disk.lookup.extents import Extent, Kind
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import HostError, ImageError, ImageInUseError, UsageError
from qedfuse.tools.source import extentbatches
from qedfuse.tools.source.chunks import Chunk, Chunker, read_segments
from qedfuse.tools.source.extentbatches import ExtentBatch, extent_batches
from qedfuse.tools.source.source import open_source
from qedfuse.tools.source.sourcebytes import read_bytes
from tests.support import chains, qemu
from tests.support.devices import loop_device
from tests.support.share import share

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal

    from qedfuse.tools.source.source import Source

ANY = OpenOptions(backing=BackingPolicy("any"))


def open_and_close(path: Path | str, form: Literal["auto", "raw", "qed"] = "auto") -> Source:
    """Open and close a source; return it, closed."""

    async def work() -> Source:
        async with open_source(str(path), form, ANY) as source:
            return source

    return trio.run(work)


@pytest.mark.parametrize("seed", range(share(6, of=16)))
def test_extents_match_the_content(seed: int, tmp_path: Path) -> None:
    """Extents cover each range in order; data lies where they say, and the rest is zeros."""
    chance = random.Random(seed)
    top = chains.draw_chain(tmp_path, chance, "c", chance.randrange(1, 4))
    expected = chains.content(top)

    async def work() -> None:
        async with open_source(str(top), "auto", ANY) as source:
            assert source.size == len(expected)
            assert source.format == chains.kind(top)
            for _ in range(10):
                start = chance.randrange(source.size)
                length = chance.randrange(1, source.size + 9999)
                end = min(start + length, source.size)
                at = start
                for extent in await source.extents(start, length):
                    assert extent.start == at
                    at = extent.end
                    compare(source, extent)
                assert at == end

    def compare(source: Source, extent: Extent) -> None:
        wanted = expected[extent.start : extent.end]
        if extent.kind is Kind.DATA:
            buffer = bytearray(extent.length)
            file = source.layer_files()[extent.depth]
            assert file.read_blocking(extent.file_offset, memoryview(buffer)) == extent.length
            assert buffer == wanted
        else:
            assert not any(wanted)

    trio.run(work)


def test_a_short_read_names_the_file_that_has_the_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a base becomes shorter, the message has the name of the base: the offset is one of it."""
    base, top = tmp_path / "base.raw", tmp_path / "top.qed"
    base.write_bytes(bytes(8192) + b"data" * 1024)

    async def work() -> None:
        await create_image(str(top), 12288, backing=str(base), backing_is_raw=True)
        async with open_source(str(top), "auto", ANY) as source:
            batch = ExtentBatch(0, source.size, await source.extents(0, source.size), [])
            os.truncate(base, 8192 + 100)
            (chunk,) = Chunker(source, 4096, 1 << 20).chunks(batch)
            with pytest.raises(HostError, match=r"base\.raw: data at 0: found 8292 bytes"):
                read_segments(np.empty(chunk.length, np.uint8), chunk.segments)

            # The base becomes shorter after the lookup.
            async def extents(_start: int, _length: int) -> list[Extent]:
                return batch.extents

            monkeypatch.setattr(source, "extents", extents)
            with pytest.raises(HostError, match=r"base\.raw: data at 0: found 8292 bytes"):
                await read_bytes(source, 0, source.size)

    trio.run(work)


@pytest.mark.parametrize("seed", range(8))
def test_chunks_hold_all_data(seed: int, tmp_path: Path) -> None:
    """Chunks are whole blocks in order, within their limits; what is in none is zeros."""
    chance = random.Random(seed)
    top = chains.draw_chain(tmp_path, chance, "c", chance.randrange(1, 4))
    expected = chains.content(top)
    block_size = 1 << chance.randrange(12, 20)
    max_chunk_bytes = block_size << chance.randrange(4)

    async def work() -> list[Chunk]:
        async with open_source(str(top), "auto", ANY) as source:
            chunker = Chunker(source, block_size, max_chunk_bytes)
            return [
                chunk
                async for batch in extent_batches(source, block_size)
                for chunk in chunker.chunks(batch)
            ]

    at = 0
    for chunk in trio.run(work):
        assert chunk.start >= at
        assert not any(expected[at : chunk.start])
        at = chunk.start + chunk.length
        assert chunk.start % block_size == 0
        assert at % block_size == 0 or at == len(expected)
        assert chunk.start // max_chunk_bytes == (at - 1) // max_chunk_bytes
        for segment in chunk.segments:
            assert 0 <= segment.at < segment.at + segment.length <= chunk.length
    assert not any(expected[at:])


def test_a_raw_base_has_holes(tmp_path: Path) -> None:
    """A hole of a raw base is no data extent of the chain."""
    raw = tmp_path / "a.raw"
    with raw.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"x" * 4096)
    top = qemu.create(tmp_path / "a.qed", backing="a.raw", backing_format="raw")

    async def work() -> list[Extent]:
        async with open_source(str(top)) as source:
            return await source.extents(0, source.size)

    data = [extent for extent in trio.run(work) if extent.kind is Kind.DATA]
    assert [(extent.start, extent.length, extent.depth) for extent in data] == [(1 << 39, 4096, 1)]


def test_a_device(tmp_path: Path) -> None:
    """A block device is a raw source of its own size."""
    (tmp_path / "a").write_bytes(b"x" * (1 << 20))
    with loop_device(tmp_path / "a") as device:
        assert (open_and_close(device).size, open_and_close(device).format) == (1 << 20, "raw")


def test_formats(tmp_path: Path) -> None:
    """Images of foreign formats are the disks that QEMU serves, unless opened as raw."""
    for form, name in (("qcow2", "qcow2"), ("vmdk", "VMDK"), ("vdi", "VDI"), ("vhdx", "VHDX")):
        path = qemu.create(tmp_path / form, 1 << 20, image_format=form)
        assert open_and_close(path).size == 1 << 20
        with (
            loop_device(path) as device,
            pytest.raises(UsageError, match=f"found {name}, expected"),
        ):
            open_and_close(device)
        assert open_and_close(path, "raw").size == path.stat().st_size
    (tmp_path / "luks").write_bytes(b"LUKS\xba\xbe\0\2" + bytes(4088))
    with pytest.raises(UsageError, match=r"luks: format: found LUKS, expected raw or qed"):
        open_and_close(tmp_path / "luks")
    image = qemu.create(tmp_path / "a.qed", 1 << 20)
    assert open_and_close(image).format == "qed"
    assert open_and_close(image, "raw").size == image.stat().st_size
    with pytest.raises(ImageError, match="not a QED image"):
        open_and_close(tmp_path / "vdi", "qed")


def test_files_that_are_no_disk(tmp_path: Path) -> None:
    """A directory, a missing file and a character device are refused without reading them."""
    with pytest.raises(ImageError, match="found a directory, expected a file or a block device"):
        open_and_close(tmp_path)
    with pytest.raises(HostError, match="cannot open: No such file"):
        open_and_close(tmp_path / "gone")
    with pytest.raises(ImageError, match="found a character device"):
        open_and_close("/dev/zero")


@pytest.mark.parametrize("form", ["raw", "qed"])
def test_a_source_in_use_is_refused(form: str, tmp_path: Path) -> None:
    """A disk that is open for writing is refused, unless the source is opened with force_share."""
    path = qemu.create(tmp_path / "a", 1 << 20, image_format=form)
    share = OpenOptions(force_share=True)

    async def work(options: OpenOptions) -> int:
        async with open_source(str(path), "auto", options) as source:
            return source.size

    with qemu.hold(path, image_format=form):
        with pytest.raises(ImageInUseError):
            trio.run(work, OpenOptions())
        assert trio.run(work, share) == 1 << 20


class ShortRanges:
    """A source whose calls return extents of short ranges."""

    def __init__(self, source: Source, chance: random.Random) -> None:
        self.source = source
        self.chance = chance
        self.size = source.size

    async def extents(self, start: int, length: int) -> list[Extent]:
        """Return extents of at least a byte."""
        return await self.source.extents(start, self.chance.randrange(1, length + 1))


@pytest.mark.parametrize("seed", range(12))
def test_batches_are_of_whole_blocks(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches cover the disk in whole blocks, however short the ranges that sources return."""
    chance = random.Random(f"steps {seed}")
    monkeypatch.setattr(extentbatches, "_BATCH_BYTES", 1 << chance.randrange(30))
    monkeypatch.setattr(extentbatches, "_BATCH_EXTENTS", 1 << chance.randrange(15))
    paths = [chains.draw_chain(tmp_path, chance, name, chance.randrange(1, 3)) for name in "ab"]
    contents = [chains.content(path) for path in paths]
    block_size = 1 << chance.randrange(9, 20)

    async def work() -> list[ExtentBatch]:
        async with (
            open_source(str(paths[0]), "auto", ANY) as one,
            open_source(str(paths[1]), "auto", ANY) as other,
        ):
            pair = [cast("Source", ShortRanges(source, chance)) for source in (one, other)]
            return [batch async for batch in extent_batches(pair[0], block_size, pair[1])]

    at = 0
    for batch in trio.run(work):
        assert (batch.start, batch.start % block_size) == (at, 0)
        assert batch.end > at
        for extents, content in zip((batch.extents, batch.base_extents), contents, strict=True):
            position = at
            for extent in extents:
                assert extent.start == position
                position = extent.end
                assert extent.kind is Kind.DATA or not any(content[extent.start : position])
            assert position == max(at, min(batch.end, len(content)))
        at = batch.end
    assert at == len(contents[0])


@pytest.mark.expect_log("although the name ends with .raw")
@pytest.mark.parametrize("form", ["qed", "qcow2"])
@pytest.mark.parametrize(
    "words",
    [
        ["convert", "-O", "raw", "{}", "copy"],
        ["compare", "{}", "twin"],
        ["compare", "twin", "{}"],
        ["measure", "{}"],
        ["info", "--partitions", "{}"],
    ],
)
def test_an_image_in_a_raw_file_is_logged(
    words: list[str],
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An image that a guest wrote to its raw disk is not read without a line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twin").write_bytes(bytes(1 << 20))
    for name, logged in (("backup.raw", True), ("VM.RAW", True), ("vm.img", False)):
        qemu.convert(tmp_path / "twin", tmp_path / name, source_format="raw", target_format=form)
        caplog.clear()
        assert main([word.format(name) for word in words]) == 0
        (tmp_path / "copy").unlink(missing_ok=True)
        shown = form.upper() if form == "qed" else form
        line = f"{name}: found a {shown} image, although the name ends with .raw; "
        line += "it is read as an image (to read the bytes unchanged, state the format raw)"
        assert caplog.messages == [line] * logged


@pytest.mark.expect_log("although the name ends with .raw")
def test_a_stated_format_is_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The line is only about a format that was detected: -f avoids it, for both formats."""
    path = qemu.create(tmp_path / "a.raw", 1 << 20)
    open_and_close(path, "raw")
    open_and_close(path, "qed")
    assert not caplog.messages
    open_and_close(path)
    assert len(caplog.messages) == 1


@pytest.mark.expect_log("although the name ends with .raw")
@pytest.mark.parametrize("form", ["qed", "qcow2"])
def test_a_base_in_a_raw_file_is_logged_unless_its_format_is_stated(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An image as the base of a copy is logged like one as the source, but not with -F."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").write_bytes(bytes(1 << 20))
    source, base = tmp_path / "source", tmp_path / "base.raw"
    qemu.convert(source, base, source_format="raw", target_format=form)
    for words, lines in (([], 1), (["-F", form], 0), (["-F", "raw"], 0)):
        caplog.clear()
        assert main(["convert", "-B", "base.raw", *words, "-f", "raw", "source", "copy.qed"]) == 0
        found = [line for line in caplog.messages if line.startswith("base.raw: found a ")]
        assert len(found) == len(caplog.messages) == lines
        (tmp_path / "copy.qed").unlink()
