"""``qedimg resize``: growing compared with ``qemu-img resize``, and shrinking."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.disk.maintenance.diskshrinking import DiskShrinking
from tests.support import qemu
from tests.support.crashrecording import CrashRecording
from tests.support.disks import (
    build_image,
    difference,
    get_entry,
    guest_bytes,
    header_of,
    inspect_image,
    l2_entry_offset,
    opened,
    pattern,
    put_entry,
)
from tests.support.hostfiles import SECTOR, MemoryFile, RecordingFile
from tests.support.sabotage import Saboteur, without_barrier

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

CLUSTER_BYTES: Final = 4096
TABLE_SPAN_BYTES: Final = 512 * CLUSTER_BYTES


def random_disk(path: Path, chance: random.Random, backing: Path | None = None) -> int:
    """Let QEMU write an image of any geometry; return its size in bytes."""
    cluster_size, table_size = 1 << chance.randrange(12, 20), 1 << chance.randrange(1, 5)
    size = chance.randrange(1, 1 << 13) * 512
    qemu.create(path, size, cluster_size=cluster_size, table_size=table_size, backing=backing)
    for _ in range(chance.randrange(1, 6)):
        start = chance.randrange(size // 512) * 512
        length = min(size - start, chance.choice([512, 4096, 40960, 1 << 20]))
        qemu.io(path, f"write -P {chance.randrange(1, 256)} {start} {length}")
    return size


@pytest.mark.parametrize("seed", range(8))
def test_growing_as_qemu_does(seed: int, tmp_path: Path) -> None:
    """A disk grows to the same size and content as with qemu-img, however the size is written."""
    chance = random.Random(seed)
    ours, theirs = tmp_path / "ours.qed", tmp_path / "theirs.qed"
    size = random_disk(ours, chance)
    theirs.write_bytes(ours.read_bytes())
    more = chance.randrange(1 << 13) * 512
    words = chance.choice([f"+{more}", str(size + more)])
    assert main(["resize", "-q", str(ours), words]) == 0
    qemu.run("qemu-img", "resize", "-q", "-f", "qed", theirs, words)
    assert qemu.info(ours)["virtual-size"] == qemu.info(theirs)["virtual-size"] == size + more
    assert qemu.compare(ours, theirs, second_format="qed")
    assert qemu.check(ours).code == 0


@pytest.mark.parametrize("seed", range(8))
def test_an_overlay_shorter_than_its_base(seed: int, tmp_path: Path) -> None:
    """The added range of an overlay reads as zeros in both programs, not as the longer base."""
    chance = random.Random(100 + seed)
    base, top = tmp_path / "base.qed", tmp_path / "top.qed"
    random_disk(base, chance)
    qemu.io(base, f"write -P 9 0 {qemu.info(base)['virtual-size']}")
    size = random_disk(top, chance, base)
    before = qemu.content(top)
    more = chance.randrange(1, 1 << 13) * 512
    assert main(["resize", "-q", str(top), f"+{more}"]) == 0
    assert difference(qemu.content(top), before + bytes(more)) is None
    assert len(before) == size
    assert qemu.check(top).code == 0


@pytest.mark.parametrize("seed", range(12))
def test_shrinking_and_growing_again(seed: int, tmp_path: Path) -> None:
    """Data that was cut off never comes back, whichever program grows the disk."""
    chance = random.Random(200 + seed)
    base, path = tmp_path / "base.qed", tmp_path / "disk.qed"
    overlay = chance.random() < 0.5
    if overlay:
        random_disk(base, chance)
    size = random_disk(path, chance, base if overlay else None)
    before = qemu.content(path)
    less = chance.randrange(size // 512 + 1) * 512
    assert main(["resize", "-q", "--shrink", "--force", str(path), f"-{less}"]) == 0
    assert qemu.content(path) == before[: size - less]
    # Compaction has filled the free clusters.
    assert qemu.check(path).code == 0
    if overlay:
        # QEMU's growing shows the base.
        assert main(["resize", "-q", str(path), str(size)]) == 0
    else:
        qemu.run("qemu-img", "resize", "-q", "-f", "qed", path, str(size))
    assert difference(qemu.content(path), before[: size - less] + bytes(less)) is None
    assert qemu.check(path).code == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("IMAGE -1M", "expected at least 4194304 (--shrink lets the disk become smaller)"),
        ("IMAGE 1M", "expected at least 4194304 (--shrink lets the disk become smaller)"),
        ("--shrink IMAGE 1M", "found data at 2097152, past the new end at 1048576, expected none"),
        ("--shrink --force IMAGE -5M", "size: found -1048576, expected at least 0"),
        ("IMAGE +1000", "size: found 4195304, expected a multiple of 512 up to 70368744177664"),
        ("--shrink --force IMAGE 1000", "size: found 1000, expected a multiple of 512"),
        ("IMAGE 65T", "expected a multiple of 512 up to 70368744177664"),
        ("IMAGE big", "size: found 'big', expected a number of bytes"),
        ("IMAGE ++1", "size: found '+1', expected a number of bytes"),
    ],
)
def test_refusals_change_nothing(
    words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each refusal is one line, and the file does not change."""
    path = tmp_path / "disk.qed"
    qemu.create(path, 4 << 20)
    qemu.io(path, "write -P 7 2M 64K")
    before = path.read_bytes()
    assert main(["resize", *words.replace("IMAGE", str(path)).split()]) == 1
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert path.read_bytes() == before


def test_shrinking_to_the_end_of_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk shrinks without --force as long as only zeros are cut off."""
    path = tmp_path / "disk.qed"
    qemu.create(path, 8 << 20)
    qemu.io(path, "write -P 7 2M 32K", "write -z 3M 64K")
    end = (2 << 20) + (32 << 10)
    assert main(["resize", "-q", "--shrink", str(path), str(end - 512)]) == 1
    assert f"found data at {2 << 20}, past" not in (said := capsys.readouterr().err)
    assert f"past the new end at {end - 512}" in said
    assert main(["resize", "--shrink", str(path), str(end)]) == 0
    assert f"had {8 << 20} bytes, has {end}" in capsys.readouterr().out
    qemu.io(path, "read -P 7 2M 32K")
    assert qemu.check(path).code == 0


def test_a_missing_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An overlay does not grow if its base cannot be opened."""
    (tmp_path / "images").mkdir()
    path, base = tmp_path / "images" / "top.qed", tmp_path / "base"
    create = ["create", "-q", "-F", "raw"]
    assert main([*create, "-u", "-b", "gone", str(path), "1M"]) == 0
    assert main(["resize", str(path), "2M"]) == 17
    assert "gone: cannot open" in capsys.readouterr().err
    base.write_bytes(b"b" * (2 << 20))
    assert main([*create, "--force", "-b", str(base), str(path), "1M"]) == 0
    assert main(["resize", str(path), "2M"]) == 17
    assert "refused" in capsys.readouterr().err
    assert main(["resize", "-q", "--backing", "any", str(path), "2M"]) == 0
    assert qemu.content(path) == b"b" * (1 << 20) + bytes(1 << 20)


def test_data_past_the_end_takes_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Old data past the end of the disk is dropped only with --force."""
    path = tmp_path / "disk.qed"
    image = build_image(CLUSTER_BYTES, {0: b"a", 3: b"old", 600: b"older"}, table_size=2)
    path.write_bytes(image)
    assert main(["resize", str(path), "4M"]) == 13
    assert "past the end of the disk at 4096, expected none: qedimg resize --force drops" in (
        capsys.readouterr().err
    )
    assert path.read_bytes() == image
    assert main(["resize", "-q", "--force", str(path), "4M"]) == 0
    assert qemu.content(path) == b"a".ljust(4 << 20, b"\0")
    assert qemu.check(path).errors == 0


def test_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With -p progress is reported for the clusters that are dropped."""
    path = tmp_path / "disk.qed"
    clusters = {n: bytes([n % 255 + 1]) for n in range(0, 4 * 1024, 3)}
    path.write_bytes(build_image(4 * TABLE_SPAN_BYTES, clusters))
    shrink = ["resize", "-q", "--shrink", "--force", str(path), str(2 * TABLE_SPAN_BYTES)]
    assert main(shrink) == 0
    assert capfd.readouterr().err == ""
    path.write_bytes(build_image(4 * TABLE_SPAN_BYTES, clusters))
    shrink[1] = "-p"
    assert main(shrink) == 0
    shown = capfd.readouterr().err.splitlines()
    # Half of the work is dropping the clusters, the other half freeing them.
    assert shown[:3] == [f"Resizing: {percent}.0 %" for percent in (0, 25, 50)]
    assert shown[-1] == "Resizing: 100.0 %"


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize(
    "size",
    [0, CLUSTER_BYTES, 2 * CLUSTER_BYTES + 512, TABLE_SPAN_BYTES, TABLE_SPAN_BYTES + CLUSTER_BYTES],
)
async def test_each_moment_of_shrinking_is_sound(size: int, *, based: bool) -> None:
    """A kill leaves the old size, with zeros in part of what is cut off, or the new size."""
    base = pattern(3 * TABLE_SPAN_BYTES, 5) if based else b""
    numbers = (0, 1, 2, 511, 513, 1030)
    image = build_image(
        3 * TABLE_SPAN_BYTES,
        {n: pattern(CLUSTER_BYTES, n) for n in numbers},
        backing=b"base" if based else b"",
    )
    before = guest_bytes(image, base)
    file = RecordingFile(image)
    async with opened(file, [base] if based else []) as disk:
        await disk.shrink(size, force=True)
        assert disk.size == size
    sizes = set()
    for _, content in file.prefixes():
        header = header_of(content)
        sizes.add(header.image_size)
        assert inspect_image(content).errors == ()
        after = guest_bytes(content, base)
        assert after[:size] == before[:size]
        for number in numbers:
            part = slice(max(size, number * CLUSTER_BYTES), (number + 1) * CLUSTER_BYTES)
            assert after[part] == before[part] or not any(after[part]), number
    assert sizes == {3 * TABLE_SPAN_BYTES, size}
    end = header_of(file.content)
    used = end.geometry.l1_used(size)
    l1 = [get_entry(file.content, end.l1_table_offset + 8 * n) for n in range(512)]
    assert not any(l1[used:])
    assert not end.need_check


async def test_clusters_are_used_again_after_shrinking() -> None:
    """Clusters of dropped tables and data are reused by later writes."""
    image = build_image(
        3 * TABLE_SPAN_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(0, 1500, 100)}
    )
    file = MemoryFile(image)
    async with opened(file) as disk:
        await disk.shrink(0, force=True)
        await disk.flush()
        await disk.grow(3 * TABLE_SPAN_BYTES)
        for number in range(0, 1500, 100):
            await disk.write(number * CLUSTER_BYTES, pattern(CLUSTER_BYTES, number + 1))
    assert len(file.content) <= len(image)
    assert inspect_image(file.content).errors == ()
    after = guest_bytes(file.content)
    for number in range(0, 1500, 100):
        part = after[number * CLUSTER_BYTES : (number + 1) * CLUSTER_BYTES]
        assert part == pattern(CLUSTER_BYTES, number + 1)


@pytest.mark.expect_log("found 1 references to clusters that have another owner")
async def test_a_cluster_with_two_owners_is_not_freed() -> None:
    """Dropping one of two references to a cluster keeps the other one's data."""
    image = build_image(2 * TABLE_SPAN_BYTES, {0: pattern(CLUSTER_BYTES, 1), 600: b"x"})
    put_entry(image, l2_entry_offset(image, 601), get_entry(image, l2_entry_offset(image, 0)))
    file = MemoryFile(image)
    async with opened(file) as disk:
        await disk.shrink(TABLE_SPAN_BYTES, force=True)
        await disk.write(CLUSTER_BYTES, pattern(CLUSTER_BYTES, 2))
        assert await disk.read(0, CLUSTER_BYTES) == pattern(CLUSTER_BYTES, 1)


async def states_of_shrinking(image: bytearray, base: bytes, size: int) -> set[bytes]:
    """Shrink a disk; return states that a power loss may leave."""
    chance, states = random.Random(size), set()
    file = RecordingFile(image)
    async with opened(file, [base] if base else []) as disk:
        await disk.shrink(size, force=True)
    recording = CrashRecording(file)
    for point in recording.crash_points():
        failure = point.power_failure()
        for choice in itertools.islice(failure.choices(chance), 20):
            states.add(bytes(recording.contents.content(failure.state(choice))))
    return states


def tail(disk: bytes, size: int) -> NDArray[np.uint8]:
    """Return the sectors of a disk from an offset on."""
    return np.frombuffer(disk, np.uint8)[size:].reshape(-1, SECTOR)


def reveals_old_data(content: bytes, base: bytes, size: int, full: int) -> bool:
    """Return whether old data would show if only the disk's old size were restored."""
    grown = bytearray(content)
    grown[48:56] = full.to_bytes(8, "little")
    new, below = tail(guest_bytes(grown, base), size), tail(base.ljust(full, b"\0"), size)
    return not bool(((new == below).all(axis=1) | ~new.any(axis=1)).all())


DISK_BYTES: Final = 4 * TABLE_SPAN_BYTES
NUMBERS: Final = (0, 1, 2, 3, 510, 511, 513, 600, 1030, 1031, 1540)


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize(
    "size", [0, CLUSTER_BYTES + 512, TABLE_SPAN_BYTES - CLUSTER_BYTES, 2 * TABLE_SPAN_BYTES + 512]
)
async def test_power_loss_during_shrinking(size: int, *, based: bool) -> None:
    """After a power loss each sector cut off is old or zeros; in a smaller disk none is old.

    Once the disk is smaller, no old data is left to come up again.
    """
    base = pattern(DISK_BYTES, 5) if based else b""
    clusters = {n: pattern(CLUSTER_BYTES, n) for n in NUMBERS}
    image = build_image(DISK_BYTES, clusters, backing=b"base" if based else b"")
    before, sizes = guest_bytes(image, base), set()
    for content in await states_of_shrinking(image, base, size):
        assert inspect_image(content).errors == ()
        sizes.add(header_of(content).image_size)
        after = guest_bytes(content, base)
        assert after[:size] == before[:size]
        new, old = tail(after, size), tail(before[: len(after)], size)
        assert ((new == old).all(axis=1) | ~new.any(axis=1)).all()
        assert len(after) == DISK_BYTES or not reveals_old_data(content, base, size, DISK_BYTES)
    assert sizes == {DISK_BYTES, size}


async def test_entries_must_be_dropped_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the barrier before the new size, a power loss leaves old data past the end."""
    image = build_image(DISK_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in NUMBERS})
    saboteur = Saboteur(monkeypatch)
    without_barrier(DiskShrinking.shrink)(saboteur)
    states = await states_of_shrinking(image, b"", TABLE_SPAN_BYTES)
    assert saboteur.strikes
    assert not saboteur.uncalled
    assert any(
        header_of(content).image_size == TABLE_SPAN_BYTES
        and reveals_old_data(content, b"", TABLE_SPAN_BYTES, DISK_BYTES)
        for content in states
    )
