"""``qedimg rebase``: the same content over another base, compared with qemu-img."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Final

import pytest
import trio

from qedfuse.cli.qedimg.main import main
from qedfuse.errors import HostError
from qedfuse.ondisk.constants import ZERO, Feature
from qedfuse.tools.editing.rebase import rebase
from tests.support import qemu
from tests.support.chains import content, draw_chain, draw_image, failing, kind
from tests.support.disks import build_image, get_entry, header_of, l2_entry_offset, pattern
from tests.support.share import share

CLUSTER_BYTES: Final = 4096


def files(directory: Path, *without: Path) -> dict[str, bytes]:
    """Read all files of a directory except some."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path not in without}


def draw(directory: Path, chance: random.Random) -> tuple[Path, Path | None]:
    """Make an overlay, and a new base for it: of another chain, of its own, or none."""
    base = draw_chain(directory, chance, "old", chance.randrange(1, 4))
    top = draw_image(directory / "top.qed", chance, base)
    which = chance.random()
    if which < 0.2:
        return top, None
    if which < 0.5:
        return top, chance.choice(sorted(set(directory.iterdir()) - {top}))
    return top, draw_chain(directory, chance, "new", chance.randrange(1, 3))


@pytest.mark.parametrize("seed", range(share(10, of=30)))
def test_content_stays(seed: int, tmp_path: Path) -> None:
    """The content is unchanged for both programs, and no other file has changed."""
    chance = random.Random(seed)
    directory = tmp_path / "place"
    directory.mkdir()
    top, base = draw(directory, chance)
    before, others = content(top), files(directory, top)
    theirs = tmp_path / "theirs"
    shutil.copytree(directory, theirs)
    words = ["-b", base.name if base else ""]
    if base is not None:
        words += ["-F", kind(base)]
    assert main(["rebase", "-q", *words, str(top)]) == 0
    assert qemu.check(top).code == 0
    assert content(top) == before
    assert files(directory, top) == others
    header = header_of(top.read_bytes())
    assert not header.need_check
    assert header.has_backing == (base is not None)
    assert header.backing_is_raw == (base is not None and kind(base) == "raw")
    qemu.run("qemu-img", "rebase", "-f", "qed", *words, theirs / "top.qed")
    assert qemu.info(top).get("backing-filename") == qemu.info(theirs / "top.qed").get(
        "backing-filename"
    )
    # QEMU arrives at the same content.
    assert qemu.content(theirs / "top.qed") == before
    assert top.stat().st_size <= (theirs / "top.qed").stat().st_size


def test_ranges_that_both_bases_share_are_not_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base with equal content costs no cluster; zeros cost at most a table."""
    data = pattern(32 * CLUSTER_BYTES, 3)
    base = {number: data[number * CLUSTER_BYTES :][:CLUSTER_BYTES] for number in range(32)}
    (tmp_path / "one.qed").write_bytes(build_image(1 << 20, base, table_size=2))
    (tmp_path / "two.qed").write_bytes(
        build_image(
            1 << 20, {**base, 40: b"only here"}, cluster_size=2 * CLUSTER_BYTES, table_size=2
        )
    )
    top = tmp_path / "top.qed"
    qemu.create(top, 1 << 20, cluster_size=CLUSTER_BYTES, table_size=2, backing="one.qed")
    shutil.copy(tmp_path / "one.qed", tmp_path / "copy.qed")
    length = top.stat().st_size
    assert main(["rebase", "-b", "copy.qed", str(top)]) == 0
    assert capsys.readouterr().out == (
        f"{top}: has the base copy.qed; copied from the old base: 0 bytes as data, 0 as zeros\n"
    )
    assert top.stat().st_size == length
    before = content(top)
    (tmp_path / "two.qed").write_bytes(
        build_image(1 << 20, {**base, 200: b"only here"}, table_size=2)
    )
    assert main(["rebase", "-b", "two.qed", str(top)]) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"copied from the old base: 0 bytes as data, {CLUSTER_BYTES} as zeros\n")
    assert top.stat().st_size == length + 2 * CLUSTER_BYTES
    assert content(top) == before


def test_clusters_longer_than_a_chunk(tmp_path: Path) -> None:
    """Clusters of 4 MiB are compared in chunks, and copied whole."""
    size, cluster = 22 << 20, 4 << 20
    (tmp_path / "old.raw").write_bytes(bytes(6 << 20) + b"o" * (4 << 20) + b"s" * (8 << 20))
    new = bytearray((tmp_path / "old.raw").read_bytes())
    new[3 << 20] = 1
    new[(11 << 20) + 5] = 2
    (tmp_path / "new.raw").write_bytes(new + b"past the old end")
    top = qemu.create(
        tmp_path / "top.qed",
        size,
        cluster_size=cluster,
        table_size=2,
        backing="old.raw",
        backing_format="raw",
    )
    before = content(top)
    assert main(["rebase", "-q", "-b", "new.raw", "-F", "raw", str(top)]) == 0
    assert content(top) == before
    assert qemu.check(top).code == 0
    image = top.read_bytes()
    entries = [get_entry(image, l2_entry_offset(image, number)) for number in range(6)]
    assert [min(entry, 2) for entry in entries] == [ZERO, 0, 2, 0, 2, 0]


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.expect_log("refuses")
def test_failing_changes_of_files(seed: int, tmp_path: Path, *, lasting: bool) -> None:
    """Whichever change of a file fails, the disk reads as before and has no damage."""
    chance = random.Random(1000 + seed)
    directory = tmp_path / "place"
    directory.mkdir()
    top, base = draw(directory, chance)
    before, original = content(top), top.read_bytes()
    name = base.name if base else None
    if base is not None and seed % 2:
        # A name that does not fit into the header's sector.
        name = "./" * 300 + base.name

    async def work() -> None:
        await rebase(str(top), name, backing_format=base and kind(base))  # type: ignore[arg-type]

    with failing(0) as changes:
        trio.run(work)
    assert content(top) == before
    total, reported = changes.count, 0
    for when in sorted({1, total - 1, total, *chance.sample(range(1, total + 1), min(10, total))}):
        top.write_bytes(original)
        with failing(when, lasting=lasting):
            try:
                trio.run(work)
            except* HostError:
                reported += 1
        assert qemu.content(top) == before, when
        assert qemu.check(top).errors == 0, when
    # Not all: a punch that fails is ignored.
    assert reported > 0


def named(path: Path) -> tuple[str | None, int]:
    """Return the base that QEMU finds, and the feature bits."""
    return qemu.info(path).get("backing-filename"), header_of(path.read_bytes()).features


@pytest.mark.parametrize("length", [1, 40, 447, 448, 449, 1000, 1023])
@pytest.mark.parametrize("old", [5, 448, 449, 1023, 1500])
def test_names_of_any_length(length: int, old: int, tmp_path: Path) -> None:
    """With -u only the name changes, whether it fits into the header's sector or not."""
    top = tmp_path / "top.qed"
    content_before = build_image(1 << 20, {3: b"x"}, table_size=2, backing=b"o" * old)
    top.write_bytes(content_before)
    for name, base_format in (
        (b"n" * length, "raw"),
        (b"m" * length, "qed"),
        (b"n" * length, "raw"),
    ):
        assert (
            main(["rebase", "-q", "-u", "-F", base_format, "-b", os.fsdecode(name), str(top)]) == 0
        )
        bits = Feature.BACKING_FILE
        if base_format == "raw":
            bits |= Feature.BACKING_FORMAT_NO_PROBE
        assert named(top) == (os.fsdecode(name), bits)
        assert top.read_bytes()[CLUSTER_BYTES:] == content_before[CLUSTER_BYTES:]
    assert main(["rebase", "-q", "-u", "-b", "", str(top)]) == 0
    assert named(top) == (None, 0)


@pytest.mark.parametrize("unsafe", [[], ["-u"]], ids=["safe", "unsafe"])
def test_a_long_name_beside_an_old_name_that_fills_the_header(
    unsafe: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A name without space in the header is refused before anything changes; a short one fits."""
    monkeypatch.chdir(tmp_path)  # short paths, because the host's limit is 4095 bytes
    top, base = Path("top.qed"), Path("base.raw")
    base.write_bytes(b"b" * 9000)
    old = b"./" * 1996 + base.name.encode()
    features = Feature.BACKING_FORMAT_NO_PROBE
    image = build_image(
        1 << 20, {3: b"x"}, table_size=2, backing=old, features=features, autoclear=1
    )
    top.write_bytes(image)
    before = content(top)
    Path("new.raw").write_bytes(b"n" * 9000)
    words = ["rebase", "-q", *unsafe, "-F", "raw"]
    for length in (449, 1023):
        name = "./" * (length // 2 - 4) + "/" * (length % 2 + 1) + "new.raw"
        assert len(name) == length
        assert main([*words, "-b", name, str(top)]) == 1
        assert capsys.readouterr().err == (
            f"qedimg: {top}: backing file name: found the present name in bytes 64 to 4063 of the "
            f"header's 4096 bytes, which leaves no space for a new name of {length} bytes, "
            "expected a new name of at most 448 bytes\n"
        )
        assert top.read_bytes() == image
    name = "./" * 220 + "/new.raw"
    assert len(name) == 448
    assert main([*words, "-b", name, str(top)]) == 0
    bits = Feature.BACKING_FILE | Feature.BACKING_FORMAT_NO_PROBE
    assert named(top) == (name, bits)
    if not unsafe:
        assert content(top) == before


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("new", [b"n" * 20, b"n" * 448, b"n" * 449, b""])
@pytest.mark.parametrize("old", [b"o" * 20, b"o" * 600, b"o" * 2000, b""])
@pytest.mark.expect_log("refuses")
def test_the_name_is_the_old_or_the_new_one(
    old: bytes, new: bytes, tmp_path: Path, *, lasting: bool
) -> None:
    """Whichever write fails, the image names the old or the new base."""
    top = tmp_path / "top.qed"
    image = build_image(1 << 20, {3: b"x"}, table_size=2, autoclear=1, backing=old)

    async def work() -> None:
        await rebase(str(top), os.fsdecode(new), backing_format="raw", unsafe=True)

    top.write_bytes(image)
    with failing(0) as changes:
        trio.run(work)
    done = named(top)
    found = set()
    for when in range(1, changes.count + 1):
        top.write_bytes(image)
        with failing(when, lasting=lasting), pytest.raises((HostError, BaseExceptionGroup)):
            trio.run(work)
        found.add(named(top))
    assert found <= {done, (os.fsdecode(old) or None, header_of(image).features)}


def test_unknown_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown compatible bits stay, autoclear bits are cleared, incompatible ones are refused."""
    (tmp_path / "base.raw").write_bytes(b"b" * 9000)
    top = tmp_path / "top.qed"
    top.write_bytes(build_image(1 << 20, {0: b"x"}, table_size=2, compat=1 << 40, autoclear=1 << 5))
    before = qemu.content(top)
    assert main(["rebase", "-q", "-F", "raw", "-b", "base.raw", str(top)]) == 0
    header = header_of(top.read_bytes())
    assert header.compat_features == 1 << 40
    assert header.autoclear_features == 0
    assert qemu.content(top) == before
    top.write_bytes(build_image(1 << 20, {0: b"x"}, features=1 << 9))
    image = top.read_bytes()
    assert main(["rebase", "-q", "-F", "raw", "-b", "base.raw", str(top)]) == 14
    assert top.read_bytes() == image
    assert "unknown incompatible bits" in capsys.readouterr().err


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each refusal is one line with its exit code, and the image does not change."""
    top, loop = tmp_path / "top.qed", tmp_path / "loop.qed"
    (tmp_path / "base.raw").write_bytes(b"b" * 9000)
    (tmp_path / "bad.qed").write_bytes(b"QED\0" + bytes(60))
    (tmp_path / "q.qcow2").write_bytes(b"QFI\xfb" + bytes(600))
    qemu.create(top, 1 << 20)
    qemu.create(loop, 1 << 20, backing="top.qed")
    image = top.read_bytes()
    for words, code, text in (
        (["-b", "top.qed"], 17, "loop"),
        (["-b", "loop.qed", "-F", "qed"], 17, "loop"),
        (["-b", "base.raw"], 1, "-F raw"),
        (["-b", "base.raw", "-F", "qed"], 17, "expected a QED image"),
        (["-b", "q.qcow2"], 25, "qemu-nbd"),
        (["-b", "q.qcow2", "-F", "qed"], 25, "qemu-nbd"),
        (["-b", "bad.qed"], 12, "cluster_size"),
        (["-b", "missing"], 17, "No such file"),
        (["-u", "-b", "missing"], 1, "-F raw"),
        (["-b", "nbd:host"], 1, "plain path"),
        (["-u", "-F", "raw", "-b", "n" * 1024], 1, "1023"),
        (["-b", str(tmp_path)], 17, "a directory"),
        (["-u", "-F", "qed", "-b", "top.qed"], 17, "found the image itself"),
        (["-u", "-F", "qed", "-b", "loop.qed"], 17, "the image itself through loop.qed"),
    ):
        assert main(["rebase", *words, str(top)]) == code, words
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == 1
        assert text in complaint
        assert top.read_bytes() == image
    with qemu.hold(top):
        assert main(["rebase", "-b", "", str(top)]) == 16
    with qemu.hold(tmp_path / "base.raw", image_format="raw"):
        assert main(["rebase", "-b", "base.raw", "-F", "raw", str(top)]) == 16


@pytest.mark.parametrize("unsafe", [[], ["-u"]], ids=["safe", "unsafe"])
def test_a_base_whose_format_cannot_be_recorded_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unsafe: list[str]
) -> None:
    """A fixed VHD with -F vpc is refused, because the image would later read it as raw."""
    top = qemu.create(tmp_path / "top.qed", 1 << 20)
    base, growing = tmp_path / "fixed.vhd", tmp_path / "growing.vhd"
    for path, subformat in ((base, "fixed"), (growing, "dynamic")):
        qemu.run(
            "qemu-img", "create", "-q", "-f", "vpc", "-o", f"subformat={subformat}", path, "1M"
        )
    image = top.read_bytes()
    words = ["rebase", "-q", *unsafe, "-F", "vpc"]
    assert main([*words, "-b", base.name, str(top)]) == 17
    assert capsys.readouterr().err == (
        f"qedimg: {top}: backing file {base}: found no magic of an image, expected the format vpc\n"
    )
    assert top.read_bytes() == image
    assert main([*words, "-b", growing.name, str(top)]) == 0
    assert qemu.info(top)["backing-filename"] == growing.name


def test_bases_outside_the_directory_need_permission(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bases outside the image's directory are opened only if the user allows it."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    top = inside / "top.qed"
    for name in ("old.raw", "new.raw"):
        (outside / name).write_bytes(pattern(50_000, len(name)))
    (outside / "new.raw").write_bytes(pattern(70_000, 2))
    qemu.create(top, 1 << 20, backing="../outside/old.raw", backing_format="raw")
    before = qemu.content(top)
    words = ["rebase", "-q", "-F", "raw", "-b", "../outside/new.raw", str(top)]
    assert main(words) == 17
    assert "backing_dir" in capsys.readouterr().err
    assert main([*words, "--backing-dir", str(outside)]) == 0
    assert qemu.content(top) == before
    assert main(["rebase", "-q", "-b", "", "--backing", "any", str(top)]) == 0
    assert qemu.content(top) == before


def test_a_damaged_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If the old base cannot be read, the image keeps it."""
    old = build_image(1 << 20, {0: b"x", 9: 3 * CLUSTER_BYTES + 1}, table_size=2)
    (tmp_path / "old.qed").write_bytes(old)
    top = tmp_path / "top.qed"
    top.write_bytes(build_image(1 << 20, {1: b"y"}, table_size=2, backing=b"old.qed"))
    assert main(["rebase", "-q", "-b", "", str(top)]) == 13
    assert "unaligned" in capsys.readouterr().err
    assert named(top)[0] == "old.qed"
    # With -u the old base is not opened.
    (tmp_path / "old.qed").unlink()
    assert main(["rebase", "-q", "-u", "-b", "", str(top)]) == 0
    assert named(top)[0] is None
