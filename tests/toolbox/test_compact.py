"""``qedimg compact``: no cluster is free afterwards, and the report says what it did."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.disk.space.scan import Scan
from qedfuse.errors import HostError, NeedsCheckError
from qedfuse.hostio.posixfile import PosixFile
from tests.support import qemu
from tests.support.disks import build_image, get_entry, l2_entry_offset, put_entry

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.errors import QedError


def image_with_free_clusters(path: Path, chance: random.Random, backing: str | None = None) -> None:
    """Let QEMU write an image, and free some of its clusters."""
    cluster_size, table_size = 1 << chance.randrange(12, 18), 1 << chance.randrange(1, 5)
    qemu.create(path, 8 << 20, cluster_size=cluster_size, table_size=table_size)
    for _ in range(6):
        qemu.io(path, f"write -P {chance.randrange(1, 256)} {chance.randrange(7 << 20)} 1M")
    # Large enough for whole clusters, and small enough to leave some data.
    qemu.io(path, "write -z -u 2M 1M", "write -z -u 5M 512K")
    if backing is not None:
        qemu.run("qemu-img", "rebase", "-u", "-f", "qed", "-b", backing, "-F", "raw", path)


@pytest.mark.parametrize("seed", range(6))
def test_no_cluster_is_free_afterwards(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """QEMU finds no leak afterwards, the content is the same, and the reported sizes are right."""
    path = tmp_path / "disk.qed"
    image_with_free_clusters(path, random.Random(seed))
    with path.open("ab") as file:
        file.write(bytes(qemu.info(path)["cluster-size"] * 3))
    content, before = qemu.content(path), path.stat().st_size
    assert main(["compact", "--output", "json", str(path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["file-size-before"] == before
    assert said["file-size"] == path.stat().st_size < before
    assert said["free-clusters"] == 0
    assert qemu.check(path).code == 0
    assert qemu.content(path) == content
    assert main(["compact", str(path)]) == 0
    text = capsys.readouterr().out
    size = path.stat().st_size
    assert text == f"{path}: the file had {size} bytes and has {size}; 0 clusters moved\n"


def test_the_base_is_not_needed(tmp_path: Path) -> None:
    """An overlay is compacted without its base, and its zero clusters stay."""
    path = tmp_path / "top.qed"
    image_with_free_clusters(path, random.Random(9), backing="/nowhere/base")
    assert main(["compact", "-q", str(path)]) == 0
    (tmp_path / "base").write_bytes(b"b" * (8 << 20))
    qemu.run("qemu-img", "rebase", "-u", "-f", "qed", "-b", "base", "-F", "raw", path)
    qemu.io(path, "read -P 0 2M 1M")
    assert qemu.check(path).code == 0


@pytest.mark.expect_log("references to clusters that have another owner")
@pytest.mark.expect_log("not compacted: the free clusters are not known")
def test_damage_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image with damaged tables is refused and not changed."""
    path = tmp_path / "a disk.qed"
    content = build_image(1 << 20, dict.fromkeys(range(9), b"x"), table_size=2)
    put_entry(content, l2_entry_offset(content, 3), get_entry(content, l2_entry_offset(content, 4)))
    path.write_bytes(content)
    assert main(["compact", str(path)]) == 13
    command = f"repair them first: qedimg check -r all '{path}'\n"
    assert capsys.readouterr().err.endswith(command)
    assert path.read_bytes() == content
    assert main(["check", "-q", "-r", "all", str(path)]) == 3
    assert main(["compact", "-q", str(path)]) == 0


@pytest.mark.expect_log("while looking for free space")
@pytest.mark.expect_log("not compacted: the free clusters are not known")
@pytest.mark.parametrize(
    ("error", "code"), [(HostError("the host refuses"), 1), (NeedsCheckError("too large"), 15)]
)
def test_a_scan_that_fails_is_reported(
    error: QedError,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the free clusters cannot be found, the command fails, and nothing is moved."""
    path = tmp_path / "disk.qed"
    image_with_free_clusters(path, random.Random(3))
    before = path.read_bytes()

    async def fail(_scan: Scan) -> None:
        raise error.again()

    monkeypatch.setattr(Scan, "_walk", fail)
    assert main(["compact", str(path)]) == code
    assert capsys.readouterr().out == ""
    assert path.read_bytes() == before


@pytest.mark.expect_log("the host refuses (while returning space to the host)")
def test_a_file_that_cannot_be_cut_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the host does not cut off the free end of the file, the command fails."""
    path = tmp_path / "disk.qed"
    content = build_image(1 << 20, dict.fromkeys(range(9), b"x")) + bytes(8 * 4096)
    path.write_bytes(content)

    async def truncate(file: PosixFile, _size: int) -> None:
        msg = f"{file.name}: the host refuses"
        raise HostError(msg)

    monkeypatch.setattr(PosixFile, "truncate", truncate)
    assert main(["compact", str(path)]) == 1
    assert capsys.readouterr().out == ""
    assert path.read_bytes() == content
    monkeypatch.undo()
    assert main(["compact", "-q", str(path)]) == 0
    assert path.stat().st_size == len(content) - 8 * 4096


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image in use and a file that is not an image are refused with one line each."""
    path = tmp_path / "disk.qed"
    qemu.create(path, 1 << 20)
    with qemu.hold(path):
        assert main(["compact", str(path)]) == 16
    (tmp_path / "text").write_text("no image", encoding="utf-8")
    assert main(["compact", str(tmp_path / "text")]) == 12
    assert capsys.readouterr().err.count("\n") == 2
