"""``qedimg commit``: the overlay's data in its base, compared with qemu-img."""

from __future__ import annotations

import os
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import trio

import qedfuse
from qedfuse.cli.qedimg.main import main
from qedfuse.errors import HostError
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.constants import ZERO
from qedfuse.tools.editing.commit import commit
from tests.support import qemu
from tests.support.chains import assert_like_qemus, content, draw_chain, draw_image, failing, kind
from tests.support.disks import build_image, get_entry, header_of, l2_entry_offset
from tests.support.share import share

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER_BYTES = 4096


def draw(directory: Path, chance: random.Random) -> tuple[Path, Path]:
    """Make an overlay over a random chain; give it and its base."""
    base = draw_chain(directory, chance, "base", chance.randrange(1, 4))
    return draw_image(directory / "top.qed", chance, base), base


def is_sound(path: Path) -> bool:
    """Return whether QEMU finds no error; clusters freed by zeros are leaks for it."""
    return kind(path) == "raw" or qemu.check(path).code in {0, 3}


def committed(top: bytes, base: bytes) -> bytes:
    """Return the expected content of a base after the commit."""
    return top + base[len(top) :]


@pytest.mark.parametrize("seed", range(share(10, of=30)))
def test_commit_into_the_base(seed: int, tmp_path: Path) -> None:
    """The base holds what the overlay showed, as with QEMU, and the overlay is empty."""
    chance = random.Random(seed)
    directory = tmp_path / "place"
    directory.mkdir()
    top, base = draw(directory, chance)
    before, under = content(top), content(base)
    expected = committed(before, under)
    theirs = tmp_path / "theirs"
    shutil.copytree(directory, theirs)
    assert main(["commit", "-q", str(top)]) == 0
    assert content(base) == expected
    assert content(top) == before
    assert qemu.check(top).code == 0
    assert is_sound(base)
    if kind(base) == "qed":
        # Clusters that zeros freed were filled by compaction.
        assert qemu.check(base).code == 0
    header = header_of(top.read_bytes())
    assert top.stat().st_size == header.l1_end
    assert not any(top.read_bytes()[header.l1_table_offset :])
    assert header.has_backing
    assert not header.need_check
    assert {path.name for path in directory.iterdir()} == {path.name for path in theirs.iterdir()}
    assert content(base) == expected
    words = ("qemu-img", "commit", "-q", "-f", "qed", theirs / "top.qed")
    done = qemu.run(*words, codes=(0, 1))
    if done.returncode:
        # QEMU cannot grow an image that has a base itself.
        assert "Operation not supported" in done.stderr
        assert len(before) > len(under)
        assert qemu.info(base).get("backing-filename")
    else:
        found = qemu.content(theirs / base.name, image_format=kind(base))
        assert_like_qemus(found, expected, under, has_base="backing-filename" in qemu.info(base))
    # A second commit has nothing left to do.
    image = base.read_bytes()
    assert main(["commit", "-q", str(top)]) == 0
    assert base.read_bytes() == image


@pytest.mark.parametrize("seed", range(100, 106))
def test_keep_the_overlay(seed: int, tmp_path: Path) -> None:
    """With -d the overlay keeps every byte."""
    top, base = draw(tmp_path, random.Random(seed))
    image, expected = top.read_bytes(), committed(content(top), content(base))
    assert main(["commit", "-d", "-q", str(top)]) == 0
    assert top.read_bytes() == image
    assert content(base) == expected
    assert content(top) == expected[: len(content(top))]
    assert is_sound(base)


def test_zeros_free_clusters_of_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Zero clusters free the base's clusters, or become zero clusters that hide its base."""
    size, some = 64 * CLUSTER_BYTES, dict.fromkeys(range(64), b"lowest")
    (tmp_path / "low.qed").write_bytes(build_image(size, some, table_size=2))
    base, top = tmp_path / "base.qed", tmp_path / "top.qed"
    base.write_bytes(
        build_image(size, dict.fromkeys(range(32), b"base"), table_size=2, backing=b"low.qed")
    )
    top.write_bytes(
        build_image(
            size,
            {**dict.fromkeys(range(8, 40), ZERO), 50: b"top"},
            table_size=2,
            backing=b"base.qed",
        )
    )
    before = content(top)
    assert main(["commit", str(top)]) == 0
    said = capsys.readouterr().out
    assert (
        f"{CLUSTER_BYTES} bytes of data and {32 * CLUSTER_BYTES} bytes of zeros "
        f"were written into {base}" in said
    )
    image = base.read_bytes()
    entries = [get_entry(image, l2_entry_offset(image, number)) for number in range(64)]
    assert entries[8:40] == [ZERO] * 32
    assert [number for number in range(64) if entries[number] > ZERO] == [*range(8), 50]
    assert base.stat().st_blocks * 512 <= (1 + 2 + 2 + 9) * CLUSTER_BYTES
    assert content(top) == content(base) == before


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("target", [(), ("-b", "base.vpc")], ids=["", "-b"])
def test_fixed_vhd(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: tuple[str, ...], depth: int
) -> None:
    """A fixed VHD whose footer a commit could destroy is refused, unless it was declared raw."""
    base, path = tmp_path / "base.vpc", tmp_path / "1.qed"
    options = "subformat=fixed,force_size=on"
    qemu.run("qemu-img", "create", "-q", "-f", "vpc", "-o", options, base, "1M")
    assert base.read_bytes()[1 << 20 :].startswith(b"conectix")
    for number in range(1, depth + 1):
        path = tmp_path / f"{number}.qed"
        below, backing_format = (base, "vpc") if number == 1 else (f"{number - 1}.qed", "qed")
        qemu.create(path, 2 << 20, backing=below, backing_format=backing_format)
    if depth > 1 and not target:
        path = tmp_path / "1.qed"
    qemu.io(path, "write -P 5 0 64K", f"write -P 6 {(1 << 20) + 65536} 64K")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert main(["commit", *target, str(path)]) == 17
    above = tmp_path / "1.qed"
    # From depth 2 the format on the command line would make the image above the VHD raw.
    rebase = ["rebase", "-u", "-b", str(base), "-F", "raw", str(above)]
    is_deep = path != above
    hint = " ".join(["qedimg", *rebase]) if is_deep else "backing_format=raw"
    assert capsys.readouterr().err == (
        f"qedimg: {base}: found the footer of a fixed VHD image at 1048576, expected QED or raw "
        f"(to write to the file all the same: {hint})\n"
    )
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    words = ["--backing-format", "raw"]
    if is_deep:
        assert main(["commit", "-d", *words, str(path)]) == 17
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
        assert main(rebase) == 0
        words = []
    assert main(["commit", "-d", *words, *target, str(path)]) == 0
    assert base.read_bytes()[:65536] == b"\5" * 65536
    assert base.stat().st_size == 2 << 20


def test_short_footer_of_a_fixed_vhd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fixed VHD without its last byte is refused too, because QEMU accepts it."""
    base, path = tmp_path / "base.vpc", tmp_path / "1.qed"
    options = "subformat=fixed,force_size=on"
    qemu.run("qemu-img", "create", "-q", "-f", "vpc", "-o", options, base, "1M")
    os.truncate(base, (1 << 20) + 511)
    shown = qemu.run("qemu-img", "info", "-f", "vpc", base).stdout
    assert "virtual size: 1 MiB" in shown
    qemu.create(path, 1 << 20, backing=base, backing_format="vpc")
    assert main(["commit", str(path)]) == 17
    assert "found the footer of a fixed VHD image at 1048576" in capsys.readouterr().err


@pytest.mark.parametrize("base_format", ["qed", "qcow2", "vpc"])
def test_image_that_only_the_option_calls_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], base_format: str
) -> None:
    """The option does not let a commit write over the header of an image in the chain."""
    base, top = tmp_path / "base", tmp_path / "top.qed"
    qemu.create(base, 1 << 20, image_format=base_format)
    qemu.create(top, 1 << 20, backing="base", backing_format=base_format)
    qemu.io(top, "write -P 5 0 64K")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    name = {"qed": "QED", "vpc": "VHD"}.get(base_format, base_format)
    rebase = ["rebase", "-u", "-b", "base", "-F", "raw", str(top)]
    for target in ((), ("-b", "base")):
        assert main(["commit", "--backing-format", "raw", *target, str(top)]) == 17
        assert capsys.readouterr().err == (
            f"qedimg: {base}: found a {name} image, expected raw "
            f"(to write to the file all the same: {' '.join(['qedimg', *rebase])})\n"
        )
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert main(rebase) == 0
    assert main(["commit", "-q", str(top)]) == 0
    assert base.read_bytes()[:65536] == b"\5" * 65536


@pytest.mark.parametrize("target", [(), ("-b", "base")], ids=["", "-b"])
@pytest.mark.parametrize("guest_format", ["qed", "qcow2", "vdi"])
def test_data_that_begins_like_an_image(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    guest_format: str,
    target: tuple[str, ...],
) -> None:
    """A guest cannot turn an undeclared raw base into an image by the data of a commit."""
    base, top, inner = tmp_path / "base", tmp_path / "top.qed", tmp_path / "inner"
    qemu.create(base, 1 << 20)
    qemu.create(top, 1 << 20, backing="base")
    base.write_bytes(bytes(1 << 20))
    qemu.create(inner, 64 << 10, image_format=guest_format)
    with qedfuse.open(top, "r+b") as disk:
        disk.write(inner.read_bytes()[:512])
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    name = {"qed": "QED", "vdi": "VDI"}.get(guest_format, guest_format)
    rebase = ["rebase", "-u", "-b", "base", "-F", "raw", str(top)]
    assert main(["commit", *target, str(top)]) == 17
    assert capsys.readouterr().err == (
        f"qedimg: {base}: not changed: the data to commit begins like a {name} image, so the base "
        f"would no longer be recognised as raw (to declare it raw: {' '.join(['qedimg', *rebase])})"
        "\n"
    )
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert main(rebase) == 0
    assert main(["commit", "-q", *target, str(top)]) == 0
    assert base.read_bytes()[:512] == inner.read_bytes()[:512]


_PROBED = {
    "vmdk": b"version=1\n",
    "vmdk-crlf": b"version=2\r\n",
    "vmdk-3": b"version=3\n",
    "vmdk-comment": b"#" * 501 + b"\nversion=1\n",
    "vmdk-nul": b"#\0\n#\nversion=1\n",
    "vmdk-spaces": b"  \n#\n \r\nversion=1\n",
    "luks": b"LUKS\xba\xbe\0\1",
    "bochs": b"Bochs Virtual HD Image".ljust(32, b"\0")
    + b"Redolog".ljust(16, b"\0")
    + b"Growing".ljust(16, b"\0")
    + b"\0\0\2\0",
    "cloop": b"#!/bin/sh\n#V2.0 Format\n"
    b"modprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n",
}
"""First bytes of a disk that QEMU does not open as raw, though qedfuse does."""

_RAW = {
    "vmdk-4": b"version=4\n",
    "vmdk-late": b"#" * 502 + b"\nversion=1\n",
    "vmdk-empty-line": b"\nversion=1\n",
    "vmdk-tab": b"\t\nversion=1\n",
    "vmdk-unfinished": b"version=1",
    "luks-2": b"LUKS\xba\xbe\0\2",
}
"""Similar bytes that QEMU opens as raw."""


@pytest.mark.parametrize("start", [*_PROBED.values(), *_RAW.values()], ids=[*_PROBED, *_RAW])
def test_data_that_only_qemu_takes_for_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], start: bytes
) -> None:
    """A commit refuses what QEMU would open as an image in the base, such as a text of VMDK."""
    base, top, copy = tmp_path / "base", tmp_path / "top.qed", tmp_path / "copy"
    qemu.create(base, 1 << 20)
    qemu.create(top, 1 << 20, backing="base")
    base.write_bytes(bytes(1 << 20))
    with qedfuse.open(top, "r+b") as disk:
        disk.write(start)
    copy.write_bytes(start.ljust(1 << 20, b"\0"))
    shown = qemu.run("qemu-img", "info", copy, codes=(0, 1)).stdout
    assert ("file format: raw" in shown) == (start in _RAW.values())
    code = 17 if start in _PROBED.values() else 0
    assert main(["commit", "-d", str(top)]) == code
    assert ("the data to commit begins like a " in capsys.readouterr().err) == bool(code)
    written = base.read_bytes()[: len(start)]
    assert written == (bytes(len(start)) if code else start)


@pytest.mark.parametrize("option", [(), ("--backing-format", "raw")], ids=["", "raw"])
def test_base_that_only_qemu_takes_for_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, ...]
) -> None:
    """A base that only QEMU recognises as an image is not overwritten as if it were raw."""
    base, top = tmp_path / "base.luks", tmp_path / "top.qed"
    qemu.create(base, 1 << 20)
    qemu.create(top, 1 << 20, backing="base.luks")
    base.write_bytes(b"LUKS\xba\xbe\0\1".ljust(1 << 20, b"\0"))
    with qedfuse.open(top, "r+b") as disk:
        disk.seek(512 << 10)
        disk.write(b"x")
    before = base.read_bytes()
    assert main(["commit", *option, str(top)]) == 17
    rebase = ["rebase", "-u", "-b", "base.luks", "-F", "raw", str(top)]
    assert capsys.readouterr().err == (
        f"qedimg: {base}: found a LUKS image, expected raw "
        f"(to write to the file all the same: {' '.join(['qedimg', *rebase])})\n"
    )
    assert base.read_bytes() == before
    assert main(rebase) == 0
    assert main(["commit", "-q", str(top)]) == 0
    assert base.read_bytes()[512 << 10] == ord("x")


def test_fixed_vhd_declared_raw(tmp_path: Path) -> None:
    """A fixed VHD that the overlay declares raw is written to."""
    base, path = tmp_path / "base.vpc", tmp_path / "top.qed"
    options = "subformat=fixed,force_size=on"
    qemu.run("qemu-img", "create", "-q", "-f", "vpc", "-o", options, base, "1M")
    qemu.create(path, backing=base, backing_format="raw")
    qemu.io(path, "write -P 5 0 64K")
    assert main(["commit", "-q", str(path)]) == 0
    assert base.read_bytes()[:65536] == b"\5" * 65536
    assert qemu.info(base)["virtual-size"] == (1 << 20) + 512


def test_zeros_are_holes_in_a_raw_base(tmp_path: Path) -> None:
    """Zeros become holes in a raw base, also where it grows."""
    base, top = tmp_path / "base.raw", tmp_path / "top.qed"
    base.write_bytes(b"b" * (1 << 20))
    qemu.create(top, 64 << 20, backing="base.raw", backing_format="raw")
    qemu.io(top, "write -z 0 512K", "write -z -u 8M 32M", "write -P 5 50M 64K")
    before = content(top)
    assert main(["commit", "-q", str(top)]) == 0
    assert base.read_bytes() == before == content(top)
    assert base.stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.expect_log("refuses")
def test_failing_changes_of_files(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, *, lasting: bool
) -> None:
    """Whichever change of a file fails, the overlay reads as before; a second commit succeeds."""
    # Most of the second commits, but not all, find an image that was not closed cleanly.
    caplog.set_level("ERROR", "qedfuse.check.inspector")
    chance = random.Random(2000 + seed)
    directory, original = tmp_path / "place", tmp_path / "original"
    original.mkdir()
    draw(original, chance)
    top, base = original / "top.qed", max(set(original.iterdir()) - {original / "top.qed"})
    before, expected = content(top), committed(content(top), content(base))

    async def work() -> None:
        await commit(str(directory / "top.qed"))

    shutil.copytree(original, directory)
    with failing(0) as changes:
        trio.run(work)
    total, reported = changes.count, 0
    drawn = chance.sample(range(1, total + 1), min(share(3, of=10), total))
    for when in sorted({1, total - 1, total, *drawn}):
        shutil.rmtree(directory)
        shutil.copytree(original, directory)
        with failing(when, lasting=lasting):
            try:
                trio.run(work)
            except* HostError:
                reported += 1
        assert qemu.content(directory / "top.qed") == before, when
        assert qemu.check(directory / "top.qed").errors == 0, when
        assert is_sound(directory / base.name), when
        trio.run(work)
        assert qemu.content(directory / "top.qed") == before, when
        assert qemu.content(directory / base.name, image_format=kind(base)) == expected, when
        assert is_sound(directory / base.name), when
    # Not all: a punch that fails is ignored, and so is a truncation of free space.
    assert reported > 0


def test_the_base_is_durable_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No table of the overlay changes before a datasync of the base covers all its changes."""
    steps: list[tuple[str, str]] = []

    def noting(name: str, method: Any) -> Any:  # noqa: ANN401  any method of a file
        async def call(file: PosixFile, *arguments: Any) -> None:  # noqa: ANN401
            await method(file, *arguments)
            what = name if name != "pwrite" or arguments[0] else "header"
            steps.append((os.path.basename(file.path), what))  # noqa: PTH119  no I/O

        return call

    for name in ("pwrite", "truncate", "datasync", "punch"):
        monkeypatch.setattr(PosixFile, name, noting(name, getattr(PosixFile, name)))
    for name in ("try_write", "try_grow"):
        monkeypatch.setattr(PosixFile, name, lambda *_: False)
    for seed in range(6):
        directory = tmp_path / str(seed)
        directory.mkdir()
        top, base = draw(directory, random.Random(3000 + seed))
        steps.clear()
        assert main(["commit", "-q", str(top)]) == 0
        emptied = steps.index((top.name, "pwrite"))
        assert steps[emptied - 1] == (top.name, "datasync")
        ours = [step for step in steps[:emptied] if step[0] == base.name]
        late = [step for step in steps[emptied:] if step[0] == base.name]
        synced = max(at for at, step in enumerate(ours) if step[1] == "datasync")
        # After that sync the base only returns space, which a crash may lose.
        assert {what for _, what in ours[synced + 1 :]} <= {"punch", "truncate", "header"}
        assert {what for _, what in late} <= {"punch", "truncate", "header", "datasync"}


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each refusal is one line with its exit code, and no file changes."""
    base, top, alone = tmp_path / "base.qed", tmp_path / "top.qed", tmp_path / "alone.qed"
    qemu.create(base, 1 << 20)
    qemu.create(top, 1 << 20, backing="base.qed")
    qemu.create(alone, 1 << 20)
    qemu.io(top, "write -P 1 0 64K")
    files = {path: path.read_bytes() for path in (base, top, alone)}

    def refused(*words: str | os.PathLike[str], code: int, text: str) -> None:
        assert main(["commit", *(os.fspath(word) for word in words)]) == code
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == 1
        assert text in complaint
        assert {path: path.read_bytes() for path in files} == files

    refused(alone, code=17, text="found none, expected one to commit to")
    refused("--backing", "none", top, code=17, text="refused")
    with qemu.hold(base, read_only=True):
        refused(top, code=16, text="in use")
    with qemu.hold(top, read_only=True):
        refused(top, code=16, text="in use")
    qemu.run("qemu-img", "rebase", "-u", "-f", "qed", "-b", "top.qed", "-F", "qed", base)
    files[base] = base.read_bytes()
    refused(top, code=17, text="loop")
    base.unlink()
    del files[base]
    refused(top, code=17, text="No such file")


def test_a_base_outside_the_directory_needs_permission(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base outside the image's directory is written to only if the user allows it."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret").write_bytes(b"s" * 4096)
    (inside / "base").symlink_to(outside / "secret")
    top = inside / "top.qed"
    qemu.create(top, 4096, backing="base", backing_format="raw")
    qemu.io(top, "write -P 1 512 512")
    assert main(["commit", str(top)]) == 17
    assert "backing_dir" in capsys.readouterr().err
    assert (outside / "secret").read_bytes() == b"s" * 4096
    assert main(["commit", "-q", "--backing-dir", str(outside), str(top)]) == 0
    assert (outside / "secret").read_bytes() == b"s" * 512 + b"\1" * 512 + b"s" * 3072


@pytest.mark.expect_log("found invalid table entries")
def test_a_damaged_overlay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad entry is reported, and the overlay keeps everything."""
    base, top = tmp_path / "base.qed", tmp_path / "top.qed"
    qemu.create(base, 1 << 20, cluster_size=CLUSTER_BYTES, table_size=2)
    image = build_image(
        1 << 20, {0: b"x", 9: 3 * CLUSTER_BYTES + 1}, table_size=2, backing=b"base.qed"
    )
    top.write_bytes(image)
    assert main(["commit", str(top)]) == 13
    assert "unaligned" in capsys.readouterr().err
    assert top.read_bytes() == image
