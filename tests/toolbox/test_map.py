"""``qedimg map`` compared with ``qemu-img map``: the same text for any chain."""

from __future__ import annotations

import errno
import json
import os
import random
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from qedfuse.cli.qedimg.main import main
from qedfuse.disk.lookup.extents import Kind
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import BackingRefusedError, ImageInUseError
from qedfuse.hostio.lockedfile import locked_descriptor
from qedfuse.hostio.locking import LockMode
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.constants import ZERO, Feature
from qedfuse.ondisk.header import Header, build_header
from qedfuse.tools.inspection import fastmap, mapping
from qedfuse.tools.inspection.mapping import MapEntry, map_image, open_map
from qedfuse.tools.source import runs
from tests.support import extensions, qemu
from tests.support.chains import draw_any_size, draw_chain, kind
from tests.support.disks import build_image, get_entry, header_of, l2_entry_offset, put_entry
from tests.support.share import share
from tests.support.text import assert_same_lines
from tests.toolbox import memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLUSTER_BYTES = 4096
FORMS = ("human", "json")


def mapped(
    *arguments: str | Path, capsys: pytest.CaptureFixture[str], code: int = 0
) -> tuple[str, str]:
    """Run the command; give its output and its error message."""
    assert main(["map", *map(str, arguments)]) == code
    said = capsys.readouterr()
    assert bool(said.err) == bool(code), said.err
    return said.out, said.err


def by_qemu(*arguments: str | Path) -> str:
    """Run QEMU's command; before version 8.2 its JSON has no "compressed"."""
    text = qemu.run("qemu-img", "map", *map(str, arguments)).stdout
    if '"compressed"' in text:
        return text
    return re.sub(r'("data": (?:true|false))', r'\1, "compressed": false', text)


def count_fast_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an item for each call of the fast map's extension.

    In a run without extensions the test is skipped.
    """
    if not extensions.EXPECTED:
        pytest.skip("without extensions")
    lines, calls = fastmap._load(), list[int]()
    assert lines is not None, "the extension was not built"

    def counted(*arguments: Any) -> bytes | None:  # noqa: ANN401  passed on
        calls.append(1)
        return lines(*arguments)

    monkeypatch.setattr(fastmap, "_load", lambda: counted)
    return calls


@pytest.fixture(params=["fast", "slow"])
def path_taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a test with the fast map, which it must use, and without it."""
    if request.param == "slow":
        monkeypatch.setattr(fastmap, "_load", lambda: None)
        yield "slow"
    else:
        calls = count_fast_calls(monkeypatch)
        yield "fast"
        assert calls, "the fast map was not used"


@pytest.mark.parametrize("seed", range(share(8, of=24)))
def test_output_agrees_with_qemu(
    seed: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Text and JSON are QEMU's for any chain, geometry and range, with the fast map and without."""
    chance = random.Random(seed)
    top = draw_chain(tmp_path, chance, "image", chance.randrange(1, 5), draw_any_size)
    size = qemu.info(top)["virtual-size"]
    ranges: list[tuple[str, ...]] = [()]
    for _ in range(3):
        start, length = chance.randrange(size + 1), chance.randrange(size + 1)
        ranges.append((f"--start-offset={start}", f"--max-length={length}"))
    asked = [(*options, f"--output={form}", str(top)) for options in ranges for form in FORMS]
    expected = [by_qemu(*words) for words in asked]
    fast_calls = count_fast_calls(monkeypatch)
    for words, text in zip(asked, expected, strict=True):
        assert_same_lines(mapped(*words, capsys=capsys)[0], text)
    is_single_image = kind(top) == "qed" and not header_of(top.read_bytes()[:64]).has_backing
    assert bool(fast_calls) is is_single_image
    monkeypatch.setattr(fastmap, "_load", lambda: None)
    for words, text in zip(asked, expected, strict=True):
        assert_same_lines(mapped(*words, capsys=capsys)[0], text)


@pytest.mark.parametrize("seed", range(8))
def test_a_raw_file(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A raw file is mapped by its extents on the host, as by QEMU."""
    chance = random.Random(seed)
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(chance.randrange(1 << 21))
        for _ in range(4):
            file.seek(chance.randrange(1 << 21))
            file.write(b"data" * chance.randrange(1, 3000))
    for output in FORMS:
        words = ("-f", "raw", f"--output={output}", path)
        assert_same_lines(mapped(*words, capsys=capsys)[0], by_qemu(*words))
        assert_same_lines(mapped(*words[2:], capsys=capsys)[0], by_qemu(*words))


@pytest.mark.parametrize("start", ["1M", "7M"])
def test_an_empty_range(start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty range gives one empty entry, as with QEMU."""
    path = qemu.create(tmp_path / "disk.qed", 1 << 20)
    words = ("--output=json", f"--start-offset={start}", path)
    out, _err = mapped(*words, capsys=capsys)
    assert_same_lines(out, by_qemu(*words))
    assert len(json.loads(out)) == 1
    assert mapped("-q", *words, capsys=capsys)[0] == out
    assert mapped("-q", path, capsys=capsys)[0] == ""


def test_runs_are_joined_across_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run over many slices of many tables is one extent, and so is a hole between them."""
    size, geometry = 1 << 36, Header(4096, 16, 1, 0, 0, 0, 4096, 1 << 36).geometry
    tables = 3
    clusters = tables * geometry.entries
    header = Header(4096, 16, 1, 0, 0, 0, 4096, size)
    first = 4096 + geometry.table_bytes * (1 + tables)
    path = tmp_path / "disk.qed"
    with path.open("wb") as file:
        file.write(build_header(header))
        for number in range(tables):
            table = 4096 + geometry.table_bytes * (1 + number)
            file.seek(4096 + 8 * (number + (number == 2) * 500))
            file.write(table.to_bytes(8, "little"))
            file.seek(table)
            for index in range(geometry.entries):
                value = first + (number * geometry.entries + index) * 4096
                file.write(value.to_bytes(8, "little"))
        file.truncate(first + clusters * 4096)
    found = trio.run(map_image, str(path))
    assert_same_lines(
        mapped("--output=json", path, capsys=capsys)[0], by_qemu("--output=json", path)
    )
    span = geometry.table_span
    data = [entry for entry in found if entry.data]
    assert [(entry.start, entry.length) for entry in data] == [(0, 2 * span), (502 * span, span)]
    assert [entry.length for entry in found if not entry.present] == [500 * span, size - 503 * span]


@pytest.mark.usefixtures("path_taken")
def test_fragmented_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fragmented tables that are longer than one read are mapped like QEMU does."""
    chance = random.Random(5)
    count = 3 * 8192 + 77
    header = Header(4096, 16, 1, 0, 0, 0, 4096, count * CLUSTER_BYTES)
    geometry = header.geometry
    tables = header.geometry.l1_used(header.image_size)
    first = 4096 + geometry.table_bytes * (1 + tables)
    order = list(range(count))
    chance.shuffle(order)
    values = [chance.choice([0, ZERO, first + position * CLUSTER_BYTES]) for position in order]
    path = tmp_path / "disk.qed"
    with path.open("wb") as file:
        file.write(build_header(header))
        file.seek(4096)
        for number in range(tables):
            table = 4096 + geometry.table_bytes * (1 + number)
            file.write(table.to_bytes(8, "little"))
        file.seek(4096 + geometry.table_bytes)
        file.write(b"".join(value.to_bytes(8, "little") for value in values))
        file.truncate(first + count * CLUSTER_BYTES)
    for words in (("--output=json", path), (path,)):
        assert_same_lines(mapped(*words, capsys=capsys)[0], by_qemu(*words))


def bad_image(path: Path) -> Path:
    """Make an image with data, entries that point out of the file, and data again."""
    image = build_image(
        16 * CLUSTER_BYTES,
        {2: b"x" * CLUSTER_BYTES, 3: 1 << 40, 4: 12345, 5: ZERO, 6: b"x" * CLUSTER_BYTES},
    )
    path.write_bytes(image)
    return path


@pytest.mark.usefixtures("path_taken")
def test_bad_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad entries are reported as neither data nor zeros, and the exit code is 13."""
    path = bad_image(tmp_path / "bad.qed")
    out, err = mapped("--output=json", path, capsys=capsys, code=13)
    entries: list[dict[str, Any]] = json.loads(out)
    unknown = [item for item in entries if item["present"] and not item["zero"] | item["data"]]
    assert [item["start"] for item in unknown] == [3 * CLUSTER_BYTES, 4 * CLUSTER_BYTES]
    assert sum(item["length"] for item in entries) == 16 * CLUSTER_BYTES
    assert sum(item["data"] for item in entries) == 2
    assert "2 extents" in err
    assert err.count("\n") == 1
    assert len(mapped(path, capsys=capsys, code=13)[0].splitlines()) == 3
    mapped("--max-length", str(3 * CLUSTER_BYTES), path, capsys=capsys)


@pytest.mark.parametrize("is_l1", [False, True])
@pytest.mark.parametrize("runs_per_call", [1, 2, 1 << 16])
def test_a_bad_entry_over_boundaries_of_the_base_is_one_extent(
    is_l1: bool,  # noqa: FBT001
    runs_per_call: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each bad entry is one extent, whatever the base stores there and however it is read."""
    monkeypatch.setattr(runs, "_MAX_RAW_RUNS_PER_CALL", runs_per_call)
    size = 16 * CLUSTER_BYTES
    span = size // 8 * size
    with (tmp_path / "base.raw").open("wb") as file:
        for number in range(0, 64, 2):
            file.seek(number * CLUSTER_BYTES)
            file.write(b"x" * CLUSTER_BYTES)
        file.truncate(3 * span)
    features = int(Feature.BACKING_FORMAT_NO_PROBE)
    image = build_image(
        3 * span,
        {0: 0, 1: 12345, 2: 54321, 3: 0, size // 8: 0},
        cluster_size=size,
        backing=b"base.raw",
        features=features,
    )
    if is_l1:
        put_entry(image, size, 7)
        put_entry(image, size + 8, 7)
    path = tmp_path / "top.qed"
    path.write_bytes(image)
    out, err = mapped("--output=json", path, capsys=capsys, code=13)
    entries: list[dict[str, Any]] = json.loads(out)
    bad = [item for item in entries if item["present"] and not item["zero"] | item["data"]]
    length = span if is_l1 else size
    first = 0 if is_l1 else size
    assert [(item["start"], item["length"]) for item in bad] == [
        (first, length),
        (first + length, length),
    ]
    assert "found 2 extents" in err
    found = trio.run(partial(map_image, str(path), start=first + 512, length=length))
    assert [(entry.start, entry.length) for entry in found if entry.bad] == [
        (first + 512, length - 512),
        (first + length, 512),
    ]


def damaged_image(path: Path, chance: random.Random) -> bool:
    """Make an image with several kinds of bad entries; return whether an L1 entry is bad."""
    chosen = [number for number in range(1500) if chance.random() < 1 / 3]
    clusters: dict[int, bytes | int] = dict.fromkeys(chosen, b"x")
    clusters |= {chance.randrange(1500): ZERO for _ in range(40)}
    image = build_image(1500 * CLUSTER_BYTES, clusters)
    wrong = [
        7,
        4097,
        CLUSTER_BYTES,
        3 * CLUSTER_BYTES,
        len(image),
        1 << 40,
        1 << 63,
        (1 << 64) - CLUSTER_BYTES,
    ]
    for _ in range(chance.randrange(4)):
        number = chance.choice(sorted(clusters))
        put_entry(image, l2_entry_offset(image, number), chance.choice(wrong))
    has_bad_table = not chance.randrange(3)
    if has_bad_table:
        put_entry(image, CLUSTER_BYTES + 8 * chance.randrange(3), chance.choice(wrong))
    path.write_bytes(image[: len(image) - chance.choice([0, 0, CLUSTER_BYTES, 20_000])])
    return has_bad_table


@pytest.mark.parametrize("seed", range(share(10, of=25)))
def test_damage_is_mapped_as_a_disk_reads_it(
    seed: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both maps agree on damaged images, and their data is what a disk reads."""
    path = tmp_path / "damaged.qed"
    has_bad_table = damaged_image(path, random.Random(seed))
    found = trio.run(map_image, str(path))
    code = 13 if any(entry.bad for entry in found) else 0
    fast_calls = count_fast_calls(monkeypatch)
    texts = [mapped(f"--output={form}", path, capsys=capsys, code=code) for form in FORMS]
    assert fast_calls or has_bad_table
    monkeypatch.setattr(fastmap, "_load", lambda: None)
    assert texts == [mapped(f"--output={form}", path, capsys=capsys, code=code) for form in FORMS]
    trio.run(_compare_with_disk, str(path), path.stat().st_size, found)


@pytest.mark.parametrize("failure", ["refused", "short"])
@pytest.mark.parametrize("form", FORMS)
def test_a_failed_read_is_left_to_the_full_map(
    failure: str,
    form: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The full map continues where the fast map cannot read a table: its errors name the file."""
    path = tmp_path / "image"
    path.write_bytes(build_image(3000 * CLUSTER_BYTES, dict.fromkeys(range(0, 3000, 2), b"x")))
    expected = mapped(f"--output={form}", path, capsys=capsys)
    last_table = get_entry(path.read_bytes(), CLUSTER_BYTES + 8)
    read = os.pread

    def failing(fd: int, length: int, offset: int) -> bytes:
        if offset != last_table:
            return read(fd, length, offset)
        if failure == "short":
            return read(fd, 8, offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", failing)
    fast_calls = count_fast_calls(monkeypatch)
    assert mapped(f"--output={form}", path, capsys=capsys) == expected
    assert fast_calls


async def _compare_with_disk(path: str, size: int, found: list[MapEntry]) -> None:
    """Compare a map with a disk's extents, by clusters; ``size`` is the file's length in bytes."""
    async with open_disk(path) as disk:
        for entry in found:
            for start in range(entry.start, entry.start + entry.length, CLUSTER_BYTES):
                extent = (await disk.extents(start, CLUSTER_BYTES))[0]
                assert (extent.kind is Kind.BAD) == entry.bad
                assert (extent.kind is Kind.DATA) == entry.data
                if entry.data:
                    assert entry.offset is not None
                    assert extent.file_offset == entry.offset + start - entry.start < size


async def test_from_python(tmp_path: Path) -> None:
    """The function returns the same entries as data."""
    path = bad_image(tmp_path / "bad.qed")
    found = await map_image(str(path), start=5 * CLUSTER_BYTES, length=CLUSTER_BYTES + 1)
    assert found == [
        MapEntry(
            5 * CLUSTER_BYTES, CLUSTER_BYTES, 0, present=True, zero=True, data=False, offset=None
        ),
        MapEntry(
            6 * CLUSTER_BYTES, 1, 0, present=True, zero=False, data=True, offset=found[1].offset
        ),
    ]
    async with open_map(str(path)) as opened:
        assert (opened.size, opened.files) == (16 * CLUSTER_BYTES, [str(path)])


async def test_the_backing_policy_of_the_function(tmp_path: Path) -> None:
    """The function opens a base elsewhere only if its policy allows it."""
    (tmp_path / "inside").mkdir()
    base = qemu.create(tmp_path / "base.qed", 1 << 20)
    path = qemu.create(tmp_path / "inside" / "top.qed", backing=base)
    with pytest.raises(BackingRefusedError):
        await map_image(str(path))
    options = OpenOptions(backing=BackingPolicy(mode="any"))
    assert [entry.depth for entry in await map_image(str(path), options=options)] == [1]


def test_bases_are_confined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command refuses a base elsewhere with 17 unless it is allowed."""
    (tmp_path / "inside").mkdir()
    base = qemu.create(tmp_path / "base.qed", 1 << 20)
    path = qemu.create(tmp_path / "inside" / "top.qed", backing=base)
    assert "refused" in mapped(path, capsys=capsys, code=17)[1]
    out, _err = mapped("--backing", "any", "--output=json", path, capsys=capsys)
    assert_same_lines(out, by_qemu("--output=json", path))


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each refusal is one line with the exit code of its reason."""
    foreign = qemu.create(tmp_path / "foreign.img", 1 << 20, image_format="qcow2")
    assert mapped(foreign, capsys=capsys)[1] == ""
    assert "magic" in mapped("-f", "qed", foreign, capsys=capsys, code=12)[1]
    assert "directory" in mapped(tmp_path, capsys=capsys, code=12)[1]
    assert "No such file" in mapped(tmp_path / "none", capsys=capsys, code=1)[1]
    (path := tmp_path / "new.qed").write_bytes(build_image(1 << 20, features=1 << 17))
    assert "bit 17" in mapped(path, capsys=capsys, code=14)[1]


def test_beside_a_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image in use is mapped only with -U."""
    path = qemu.create(tmp_path / "disk.qed", 1 << 20)
    with qemu.hold(path):
        assert "in use" in mapped(path, capsys=capsys, code=16)[1]
        assert mapped("-U", "--output=json", path, capsys=capsys)[0].startswith("[{")


@extensions.needs_extensions
def test_a_writer_is_kept_out_in_the_middle_of_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The image stays locked where the fast map stops, so a list shows one state of the image."""
    content = build_image(16 * CLUSTER_BYTES, {3: b"x"})
    put_entry(content, l2_entry_offset(content, 5), 123)
    (path := tmp_path / "disk.qed").write_bytes(content)
    refused = []

    def open_later(*arguments: Any) -> Any:  # noqa: ANN401  those of `open_map`
        with pytest.raises(ImageInUseError), locked_descriptor(str(path), LockMode.WRITE):
            pass
        refused.append(path)
        return open_map(*arguments)

    monkeypatch.setattr(mapping, "open_map", open_later)
    assert "1 extents with invalid entries" in mapped(path, capsys=capsys, code=13)[1]
    assert refused == [path]


@pytest.mark.parametrize("kept_bytes", [0, 3, 19])
async def test_a_table_that_is_cut_while_it_is_read_is_unallocated_from_there(
    kept_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that another program cuts off just before they are read are mapped as missing."""
    image = build_image(16 * CLUSTER_BYTES, dict.fromkeys(range(16), b"x"))
    table = l2_entry_offset(image, 0)
    (path := tmp_path / "disk.qed").write_bytes(image)
    next_data = PosixFile.next_data
    cuts = []

    async def cut_after_search(self: PosixFile, offset: int) -> int | None:
        found = await next_data(self, offset)
        if offset == table:
            os.truncate(path, table + kept_bytes)
            cuts.append(found)
        return found

    monkeypatch.setattr(PosixFile, "next_data", cut_after_search)
    found = await map_image(str(path), options=OpenOptions(force_share=True))
    assert cuts == [table]
    kept = kept_bytes // 8 * CLUSTER_BYTES
    assert sum(entry.length for entry in found if entry.present) == kept
    last = found[-1]
    assert (last.start, last.length) == (kept, 16 * CLUSTER_BYTES - kept)
    assert not last.present


@extensions.needs_extensions
@pytest.mark.parametrize("missing_bytes", [3, 8])
def test_an_l1_table_that_is_cut_while_it_is_read_is_left_to_the_full_map(
    missing_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast map maps no image whose L1 table it cannot read whole."""
    (path := tmp_path / "disk.qed").write_bytes(build_image(1 << 20, {3: b"x"}))
    l1_table = header_of(bytearray(path.read_bytes())).l1_table_offset
    pread, cuts = os.pread, 0

    def short(fd: int, length: int, offset: int) -> bytes:
        nonlocal cuts
        cuts += offset == l1_table
        return pread(fd, length - missing_bytes * (offset == l1_table), offset)

    monkeypatch.setattr(os, "pread", short)
    with fastmap.open_fast_map(str(path)) as fast:
        assert fast is None
    assert cuts == 1


def test_a_hostile_image_takes_little_memory(tmp_path: Path) -> None:
    """Tables of 1 GiB that are holes are not read into memory."""
    header = Header(1 << 26, 16, 1, 0, 0, 0, 1 << 26, 1 << 60)
    geometry = header.geometry
    path = tmp_path / "hostile.qed"
    with path.open("wb") as file:
        file.write(build_header(header))
        for number in range(2):
            file.seek(header.l1_table_offset + 8 * number * 100)
            table = header.l1_end + number * geometry.table_bytes
            file.write(table.to_bytes(8, "little"))
            file.seek(table + geometry.table_bytes // 2)
            file.write((ZERO).to_bytes(8, "little") * 100)
        file.truncate(header.l1_end + 2 * geometry.table_bytes)
    out, peak, _modules = memory.run("map", "--output=json", path)
    extents = json.loads(out)
    assert [item["length"] for item in extents if item["present"]] == [100 << 26] * 2
    assert sum(item["length"] for item in extents) == 1 << 60
    assert peak < 256 << 20
