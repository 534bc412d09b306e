"""``qedimg freelist``: a list is shown, kept and dropped, and QEMU refuses it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.disk.space.scan import Scan
from qedfuse.errors import HostError, NoSpaceError
from qedfuse.hostio.posixfile import PosixFile
from tests.support import qemu
from tests.support.disks import build_image, get_entry, l2_entry_offset, pattern, put_entry
from tests.support.freelists import listed, put_list

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.hostio.hostfile import Buffer

CLUSTER_BYTES = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give an image with three free clusters."""
    content = build_image(1 << 20, {n: pattern(CLUSTER_BYTES, n) for n in range(6)}, table_size=2)
    for number in (1, 2, 4):
        put_entry(content, l2_entry_offset(content, number), 0)
    path = tmp_path / "disk.qed"
    path.write_bytes(content)
    return path


def test_on_show_off(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """QEMU refuses an image while it has a list, and accepts it after ``freelist off``."""
    assert main(["freelist", "show", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: no list of free clusters\n"
    before = qemu.content(path)
    assert main(["freelist", "on", str(path)]) == 0
    said = capsys.readouterr().out
    assert (
        said
        == f"{path}: a list of 3 free clusters (12 KiB) in 2 runs; the list itself is stored in 1 "
        "of these clusters\n"
    )
    assert listed(path.read_bytes()) is not None
    with pytest.raises(qemu.QemuError, match="Unsupported"):
        qemu.info(path)
    assert main(["freelist", "show", "--output", "json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "filename": str(path), "format": "qed", "present": True, "valid": True, "runs": 2,
        "free-clusters": 3, "free-bytes": 3 * CLUSTER_BYTES, "list-clusters": 1,
    }  # fmt: skip
    assert main(["freelist", "off", "--output", "json", str(path)]) == 0
    said = capsys.readouterr().out
    assert json.loads(said) == {"filename": str(path), "format": "qed", "present": False}
    assert qemu.content(path) == before


def test_nothing_to_list(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a free cluster no list is made, and QEMU can open the image."""
    assert main(["compact", "-q", str(path)]) == 0
    assert main(["freelist", "on", str(path)]) == 0
    assert capsys.readouterr().out == (
        f"{path}: no list was stored: no cluster is free, or the list would be too long\n"
    )
    assert qemu.check(path).code == 0


@pytest.mark.expect_log("the host refuses (while looking for free space)")
def test_a_scan_that_fails_is_reported(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the free clusters cannot be found, the command fails."""

    async def fail(_scan: Scan) -> None:
        msg = "the host refuses"
        raise HostError(msg)

    monkeypatch.setattr(Scan, "_walk", fail)
    before = path.read_bytes()
    assert main(["freelist", "on", str(path)]) == 1
    assert capsys.readouterr().out == ""
    assert path.read_bytes() == before


@pytest.mark.expect_log("the image is closed without a list")
@pytest.mark.parametrize("when", [1, 2])
def test_a_list_that_cannot_be_written_is_reported(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """If the host has no space for the list or its descriptor, the command fails."""
    calls = 0
    real = PosixFile.pwrite

    async def pwrite(file: PosixFile, offset: int, data: Buffer) -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            msg = f"{file.name}: the host is full"
            raise NoSpaceError(msg)
        await real(file, offset, data)

    monkeypatch.setattr(PosixFile, "pwrite", pwrite)
    assert main(["freelist", "on", str(path)]) == 1
    assert calls >= when
    assert capsys.readouterr().out == ""
    monkeypatch.undo()
    assert qemu.check(path).code in {0, 3}
    assert main(["freelist", "on", "-q", str(path)]) == 0
    assert listed(path.read_bytes()) is not None


@pytest.mark.expect_log("references to clusters that have another owner")
def test_damage_is_reported(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image with damaged tables gets no list, and the command fails."""
    content = bytearray(path.read_bytes())
    put_entry(content, l2_entry_offset(content, 1), get_entry(content, l2_entry_offset(content, 0)))
    path.write_bytes(content)
    assert main(["freelist", "on", str(path)]) == 13
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith(
        f"qedimg: {path}: no list was stored: found damaged tables; repair them first: "
        f"qedimg check -r all {path}\n"
    )
    assert path.read_bytes() == content


def test_a_list_that_is_not_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An invalid list is shown as invalid, with the reason."""
    content = bytearray(path.read_bytes())
    put_list(content)
    content.extend(bytes(CLUSTER_BYTES))
    path.write_bytes(content)
    assert main(["freelist", "show", str(path)]) == 0
    assert "that is not valid: " in (said := capsys.readouterr().out)
    assert "file_bytes" in said
    assert main(["freelist", "show", "--output", "json", str(path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["present"], said["valid"]) == (True, False)
    assert "file_bytes" in said["problem"]


def test_beside_a_writer(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With -U a list of an image in use is shown, but not changed."""
    with qemu.hold(path):
        assert main(["freelist", "show", str(path)]) == 16
        assert main(["freelist", "show", "-U", str(path)]) == 0
        assert main(["freelist", "on", str(path)]) == 16
        assert main(["freelist", "on", "-U", str(path)]) == 1
    needed = "needs an image that no other program has open"
    assert f"-U: freelist on {needed}" in capsys.readouterr().err


def test_the_base_is_not_needed(path: Path) -> None:
    """A list of an overlay is made and dropped without its base."""
    qemu.run("qemu-img", "rebase", "-u", "-f", "qed", "-b", "/nowhere", "-F", "raw", path)
    assert main(["freelist", "on", "-q", str(path)]) == 0
    assert listed(path.read_bytes()) is not None
    assert main(["freelist", "off", "-q", str(path)]) == 0
    assert listed(path.read_bytes()) is None
