"""``qedimg measure`` compared with what ``qedimg convert`` creates."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.cli.qedimg.main import main
from tests.support import chains, qemu

if TYPE_CHECKING:
    from pathlib import Path


def measured(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, int]:
    """Measure; return the required and the fully allocated size in bytes."""
    assert main(["measure", "--output", "json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"required", "fully-allocated"}
    return found["required"], found["fully-allocated"]


@pytest.mark.parametrize("seed", range(12))
def test_measured_sizes_are_exact(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The measured sizes are the file's to the byte, empty, copied and fully allocated."""
    chance = random.Random(seed)
    source = chains.draw_chain(tmp_path, chance, "c", chance.randrange(1, 4))
    cluster, table = 1 << chance.randrange(12, 21), 1 << chance.randrange(1, 5)
    words = ["--cluster-size", str(cluster), "--table-size", str(table)]
    words += ["-S", chance.choice(["4k", "0", "1M"])]
    form, new = ["-f", chains.kind(source)], tmp_path / "new.qed"
    required, full = measured(capsys, *words, *form, str(source))
    assert main(["convert", *words, *form, str(source), str(new)]) == 0
    assert new.stat().st_size == required
    size = qemu.info(new)["virtual-size"]
    for start in range(0, size, 1 << 20):
        qemu.io(new, f"write -P 1 {start} {min(1 << 20, size - start)}")
    assert new.stat().st_size == full
    empty = qemu.create(tmp_path / "empty.qed", size, cluster_size=cluster, table_size=table)
    assert measured(capsys, *words, "--size", str(size)) == (empty.stat().st_size, full)


def test_over_a_base_and_raw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data of the base is not counted, and a raw target needs no tables."""
    monkeypatch.chdir(tmp_path)
    base = qemu.create(tmp_path / "base.qed", 1 << 20)
    qemu.io(base, "write -P 1 0 512k")
    top = qemu.create(tmp_path / "top.qed", 1 << 20, backing="base.qed")
    qemu.io(top, "write -P 2 128k 64k")
    required, full = measured(capsys, "-B", "base.qed", str(top))
    assert required == (1 + 4 + 4 + 1) << 16
    assert full == (1 + 4 + 4 + 16) << 16
    assert measured(capsys, "-O", "raw", str(top)) == (512 << 10, 1 << 20)
    assert measured(capsys, "-O", "raw", "--size", "1M") == (0, 1 << 20)
    assert main(["measure", str(top)]) == 0
    assert capsys.readouterr().out == "required size: 1114112\nfully allocated size: 1638400\n"
    assert main(["measure", "-q", str(top)]) == 0
    assert capsys.readouterr().out == ""


def test_a_disk_that_ends_within_a_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a last partial block only its own bytes are counted."""
    (tmp_path / "a.raw").write_bytes(bytes(8192) + b"x" * 691_808)
    assert measured(capsys, "-O", "raw", str(tmp_path / "a.raw")) == (691_808, 700_000)
    assert main(["convert", "-v", str(tmp_path / "a.raw"), str(tmp_path / "a.qed")]) == 0
    assert "disk of 700000 bytes, of which 700000 are data" in capsys.readouterr().out


MISTAKES: Final = {
    "neither": ("", "SOURCE, --size: found neither, expected one"),
    "both": ("--size 1M a.raw", "SOURCE, --size: found both, expected one"),
    "missing": ("gone", "gone: cannot open: No such file"),
    "format": ("-O qcow2 a.raw", "-O: found qcow2, expected raw or qed"),
    "raw-geometry": ("-O raw --table-size 2 a.raw", "--table-size: found -O raw, expected -O qed"),
    "raw-overlay": ("-O raw -B gone a.raw", "backing file gone: found -O raw, expected -O qed"),
    "empty-raw-overlay": ("-O raw -B gone --size 1M", "backing file gone: found -O raw, expected"),
    "cluster": ("--cluster-size 5000 a.raw", "cluster size: found 5000"),
    "too-large": ("--size 65T", "image size: found 71468255805440"),
}


@pytest.mark.parametrize("row", MISTAKES)
def test_mistakes_get_one_line(
    row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each mistake is one line that says what was found."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.raw").write_bytes(b"x" * 5000)
    words, expected = MISTAKES[row]
    assert main(["measure", *words.split()]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert expected in said.err
    assert said.err.count("\n") == 1
