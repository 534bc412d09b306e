"""The comparison of texts in tests: long ones, and those with temporary paths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.text import assert_same_lines, without_temporary_directories

if TYPE_CHECKING:
    from pathlib import Path

LONG = "".join(f"{number}\n" for number in range(25_000))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (LONG.replace("\n20000\n", "\nx\n"), "line 20001: found 'x\\n', expected '20000\\n'"),
        (LONG + "more\n", "line 25001: found 'more\\n', expected None"),
        (LONG[:-6], "line 25000: found None, expected '24999\\n'"),
        (LONG[:-1], "line 25000: found '24999', expected '24999\\n'"),
    ],
)
def test_the_first_difference_is_shown(found: str, expected: str) -> None:
    """The first different line is shown in one short line, whatever the length of the texts."""
    assert_same_lines(LONG, LONG)
    with pytest.raises(pytest.fail.Exception) as caught:
        assert_same_lines(found, LONG)
    assert str(caught.value) == expected


def test_names_of_temporary_directories_are_no_part_of_a_message(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Words from the test's own name, which pytest puts into ``tmp_path``, are not found."""
    image = tmp_path / "chain" / "a.qed"
    message = f"{image}: write: the host refuses (backing file {tmp_path}/b.qed, {tmp_path}: full)"
    assert "test_names_of_temporary" in message
    assert without_temporary_directories(message, tmp_path_factory.getbasetemp()) == (
        "chain/a.qed: write: the host refuses (backing file b.qed, : full)"
    )
