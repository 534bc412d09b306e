"""The comparison of long texts in tests."""

from __future__ import annotations

import pytest

from tests.support.text import assert_same_lines

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
