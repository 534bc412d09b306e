"""Repairs that need --force, because the tables may not be those of the image."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.cli.qedimg.main import main
from tests.support.disks import build_image, header_of, l2_entry_offset, pattern, put_entry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CLUSTER_BYTES: Final = 4096


def flip_l1_offset(content: bytearray) -> None:
    """Flip one bit of the header, so that guest data is read as the L1 table."""
    struct.pack_into("<Q", content, 40, header_of(content).l1_table_offset ^ (8 * CLUSTER_BYTES))


def flip_cluster_size(content: bytearray) -> None:
    """Clear the entries, as if the cluster size were wrong: only leaks are found."""
    for number in range(300):
        put_entry(content, l2_entry_offset(content, number), 0)


def lose_the_table(content: bytearray) -> None:
    """Flip one bit of the only L1 entry."""
    content[header_of(content).l1_table_offset] ^= 0x40


def clear_the_only_l1_entry(content: bytearray) -> None:
    """Clear the only L1 entry: everything is leaked, and nothing else is wrong."""
    put_entry(content, header_of(content).l1_table_offset, 0)


DAMAGE: Final[dict[str, tuple[Callable[[bytearray], None], str]]] = {
    "l1-table-offset": (flip_l1_offset, "all"),
    "mostly-leaked": (flip_cluster_size, "leaks"),
    "only-table": (lose_the_table, "all"),
    "nothing-left": (clear_the_only_l1_entry, "leaks"),
    "nothing-left-all": (clear_the_only_l1_entry, "all"),
}


@pytest.mark.parametrize("row", DAMAGE)
def test_suspicious_tables_are_not_repaired(
    row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --force such a repair prints one line, exits with 1 and changes nothing."""
    damage, level = DAMAGE[row]
    content = build_image(
        512 * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(310)}, table_size=1
    )
    damage(content)
    path = tmp_path / "image.qed"
    path.write_bytes(content)
    assert main(["check", "-r", level, str(path)]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "image.qed: not repaired: found " in said.err
    assert "(--force repairs anyway)" in said.err
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    assert main(["check", "-r", level, "--dry-run", str(path)]) in (2, 3)
    assert "the repair needs --force" in capsys.readouterr().out
    main(["check", "--output", "json", "-r", level, "--dry-run", str(path)])
    assert json.loads(capsys.readouterr().out)["repair"]["needs-force"] is True
    assert path.read_bytes() == content
    assert main(["check", "-q", "-r", level, "--force", str(path)]) in (0, 3)


def test_need_check_of_an_empty_image_is_cleared(tmp_path: Path) -> None:
    """A repair clears NEED_CHECK of an empty image: without leaks an empty table is plausible."""
    path = tmp_path / "image.qed"
    content = build_image(512 * CLUSTER_BYTES)
    content[16] |= 2
    path.write_bytes(content)
    assert main(["check", "-q", "-r", "all", str(path)]) == 0
    assert not header_of(path.read_bytes()).need_check


def test_repair_of_leaks_changes_no_damaged_image(tmp_path: Path) -> None:
    """With ``-r leaks`` a damaged image is reported and not changed."""
    path = tmp_path / "image.qed"
    content = build_image(512 * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(310)})
    lose_the_table(content)
    path.write_bytes(content)
    assert main(["check", "-q", "-r", "leaks", str(path)]) == 2
    assert path.read_bytes() == content
