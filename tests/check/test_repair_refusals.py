"""What a repair does not touch unless it is forced: tables that are hardly the image's."""

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

CLUSTER: Final = 4096


def flip_l1_offset(content: bytearray) -> None:
    """Flip one bit of the header, so that the guest's data is taken for the L1 table."""
    struct.pack_into("<Q", content, 40, header_of(content).l1_table_offset ^ (8 * CLUSTER))


def flip_cluster_size(content: bytearray) -> None:
    """Have clusters of another size, where nothing but leaks can be seen."""
    for number in range(300):
        put_entry(content, l2_entry_offset(content, number), 0)


def lose_the_table(content: bytearray) -> None:
    """Flip one bit of the only L1 entry."""
    content[header_of(content).l1_table_offset] ^= 0x40


def lose_the_table_quietly(content: bytearray) -> None:
    """Clear the only L1 entry: everything is leaked, and nothing else is wrong."""
    put_entry(content, header_of(content).l1_table_offset, 0)


DAMAGE: Final[dict[str, tuple[Callable[[bytearray], None], str]]] = {
    "l1-table-offset": (flip_l1_offset, "all"),
    "mostly-leaked": (flip_cluster_size, "leaks"),
    "only-table": (lose_the_table, "all"),
    "nothing-left": (lose_the_table_quietly, "leaks"),
    "nothing-left-all": (lose_the_table_quietly, "all"),
}


@pytest.mark.parametrize("row", DAMAGE)
def test_tables_in_doubt_are_not_touched(
    row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, code 1, not a byte changed and no file made; a dry run says what it takes."""
    damage, level = DAMAGE[row]
    content = build_image(512 * CLUSTER, {n: pattern(CLUSTER, n) for n in range(310)}, table_size=1)
    damage(content)
    path = tmp_path / "image.qed"
    path.write_bytes(content)
    assert main(["check", "-r", level, str(path)]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "image.qed: not repaired: found " in said.err
    assert "(--force repairs all the same)" in said.err
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
    assert main(["check", "-r", level, "--dry-run", str(path)]) in (2, 3)
    assert "this takes --force" in capsys.readouterr().out
    main(["check", "--output", "json", "-r", level, "--dry-run", str(path)])
    assert json.loads(capsys.readouterr().out)["repair"]["needs-force"] is True
    assert path.read_bytes() == content
    assert main(["check", "-q", "-r", level, "--force", str(path)]) in (0, 3)


def test_an_empty_image_that_was_not_closed_is_closed(tmp_path: Path) -> None:
    """Nothing is in use, but nothing is leaked either: that is no sign of anything."""
    path = tmp_path / "image.qed"
    content = build_image(512 * CLUSTER)
    content[16] |= 2
    path.write_bytes(content)
    assert main(["check", "-q", "-r", "all", str(path)]) == 0
    assert not header_of(path.read_bytes()).need_check


def test_damage_stays_damage_for_leaks(tmp_path: Path) -> None:
    """``-r leaks`` changes no damaged image, and says what is wrong rather than refuse."""
    path = tmp_path / "image.qed"
    content = build_image(512 * CLUSTER, {n: pattern(CLUSTER, n) for n in range(310)})
    lose_the_table(content)
    path.write_bytes(content)
    assert main(["check", "-q", "-r", "leaks", str(path)]) == 2
    assert path.read_bytes() == content
