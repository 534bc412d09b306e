"""tests/systems.sh takes only what it knows; what it does takes too long to be tested here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import pytest

SCRIPT: Final = Path(__file__).parents[1] / "systems.sh"
KNOWN: Final = "bookworm trixie"


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (("--help",), 0, "tests/systems.sh [-d DIR] [bookworm|trixie]..."),
        (("sid",), 1, f"systems.sh: found sid, expected one of: {KNOWN}\n"),
        (("bookworm trixie",), 1, f"systems.sh: found bookworm trixie, expected one of: {KNOWN}\n"),
        (("",), 1, f"systems.sh: found , expected one of: {KNOWN}\n"),
        (("bookworm", "-d"), 1, "systems.sh: -d: expected a directory\n"),
    ],
)
def test_arguments(words: tuple[str, ...], code: int, shown: str) -> None:
    """A mistake is one line, before anything is made."""
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert shown in (done.stderr if code else done.stdout)
    assert done.stderr.count("\n") == bool(code)


def test_the_readme_names_each_system() -> None:
    """What is said to be tested is what the script runs."""
    readme = (SCRIPT.parents[1] / "README.md").read_text(encoding="utf-8")
    for name in ("Debian 12", "Debian 13"):
        assert f"\n| {name} | 3." in readme
