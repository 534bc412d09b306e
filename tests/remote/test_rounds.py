"""Disasters drawn at random: a few rounds of `tests.remote.rounds`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("seed", range(4))
def test_rounds(seed: int) -> None:
    """Each read after a disaster has the right bytes or fails, and later reads are right."""
    command = [sys.executable, "-m", "tests.remote.rounds", "--rounds", "15", "--seed", str(seed)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 rounds: all bytes right" in done.stdout
