"""``qedimg commit -b``: into a lower file of the chain, compared with qemu-img."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.cli.qedimg.main import main
from qedfuse.errors import HostError, ImageInUseError
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.constants import ZERO
from qedfuse.tools.editing.commit import commit
from tests.support import qemu
from tests.support.chains import assert_like_qemus, content, draw_chain, draw_image, failing, kind
from tests.support.disks import build_image

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER_BYTES = 4096


def below(directory: Path) -> list[Path]:
    """List the files of a chain that `draw_chain` made, from the lowest up."""
    return sorted(path for path in directory.iterdir() if path.name.startswith("base"))


@pytest.mark.parametrize("seed", range(200, 205))
def test_the_base_holds_what_the_top_shows(seed: int, tmp_path: Path) -> None:
    """The base holds what the top image showed, as with qemu-img, and the top image is kept."""
    chance = random.Random(seed)
    directory = tmp_path / "place"
    directory.mkdir()
    draw_chain(directory, chance, "base", 3)
    files = below(directory)
    top = draw_image(directory / "top.qed", chance, files[-1])
    base = files[chance.randrange(2)]
    shown, under = content(top), content(base)
    expected = shown + under[len(shown) :]
    kept = {path: path.read_bytes() for path in directory.iterdir() if path != base}
    theirs = tmp_path / "theirs"
    shutil.copytree(directory, theirs)
    assert main(["commit", "-q", "-b", base.name, str(top)]) == 0
    assert content(base) == expected
    assert content(top) == shown
    assert {path: path.read_bytes() for path in kept} == kept
    if kind(base) == "qed":
        assert qemu.check(base).code in {0, 3}
    done = qemu.run(
        "qemu-img", "commit", "-q", "-f", "qed", "-b", base.name, theirs / "top.qed", codes=(0, 1)
    )
    if done.returncode:
        # QEMU cannot grow an image that has a base itself.
        assert "Operation not supported" in done.stderr
        assert len(shown) > len(under)
        assert qemu.info(base).get("backing-filename")
        return
    assert (theirs / "top.qed").read_bytes() == kept[top]
    found = qemu.content(theirs / base.name, image_format=kind(base))
    assert_like_qemus(found, expected, under, has_base="backing-filename" in qemu.info(base))


def make_chain(directory: Path) -> Path:
    """Make a chain of three images, each with its own clusters; give the top."""
    size = 64 * CLUSTER_BYTES
    (directory / "low.qed").write_bytes(
        build_image(size, dict.fromkeys(range(32), b"low"), table_size=2)
    )
    (directory / "middle.qed").write_bytes(
        build_image(
            size // 2, {1: b"middle", 2: ZERO, 3: b"hidden"}, table_size=2, backing=b"low.qed"
        )
    )
    top = directory / "top.qed"
    top.write_bytes(build_image(size, {3: b"top", 40: b"top"}, table_size=2, backing=b"middle.qed"))
    return top


def test_names_of_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base of the chain is found by relative, absolute and linked names; others are refused."""
    make_chain(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.qed").symlink_to("low.qed")
    (tmp_path / "other").mkdir()
    (tmp_path / "none.qed").write_bytes((tmp_path / "low.qed").read_bytes())
    for name in ("low.qed", "./low.qed", "file:low.qed", f"{tmp_path}/low.qed", "link.qed"):
        assert main(["commit", "-b", name, f"{tmp_path}/top.qed"]) == 0
        said = capsys.readouterr().out
        assert f"were written into {tmp_path}/low.qed" in said
        assert "the images between the overlay and the base must not be used any more" in said
    for name in ("none.qed", "gone.qed", "top.qed"):
        assert main(["commit", "-b", name, "top.qed"]) == 17
        assert capsys.readouterr().err == (
            f"qedimg: top.qed: backing file {name}: found no such file in the chain, expected "
            "one of: middle.qed, low.qed\n"
        )
    assert main(["commit", "-b", "low.qed", "low.qed"]) == 17
    assert "expected one of: none" in capsys.readouterr().err
    # A commit into the next image keeps the overlay too.
    before = (tmp_path / "top.qed").read_bytes()
    assert main(["commit", "-b", "middle.qed", "top.qed"]) == 0
    assert "between" not in capsys.readouterr().out
    assert (tmp_path / "top.qed").read_bytes() == before


@pytest.mark.parametrize("held", ["top.qed", "middle.qed", "low.qed"])
def test_files_in_use(tmp_path: Path, held: str) -> None:
    """A file of the chain that another program writes is a reason to refuse."""
    top = make_chain(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    file = PosixFile.open(str(tmp_path / held), writable=True)
    lock_image(file.fd, LockMode.WRITE, file.name)
    try:
        with pytest.raises(ImageInUseError):
            trio.run(lambda: commit(str(top), base="low.qed"))
    finally:
        file.close()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.expect_log("refuses")
@pytest.mark.expect_log("was not closed cleanly")
def test_failing_changes_of_files(tmp_path: Path) -> None:
    """Whichever change of a file fails, the top reads as before, and a second commit succeeds."""
    original, directory = tmp_path / "original", tmp_path / "place"
    original.mkdir()
    shown = content(make_chain(original))
    top, reported = directory / "top.qed", 0

    async def work() -> None:
        await commit(str(top), base="low.qed")

    shutil.copytree(original, directory)
    with failing(0) as changes:
        trio.run(work)
    for when in range(1, changes.count + 1):
        shutil.rmtree(directory)
        shutil.copytree(original, directory)
        with failing(when, lasting=True):
            try:
                trio.run(work)
            except* HostError:
                reported += 1
        assert qemu.content(top) == shown, when
        trio.run(work)
        assert qemu.content(directory / "low.qed") == shown == qemu.content(top), when
    assert reported == changes.count
