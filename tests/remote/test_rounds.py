"""Disasters drawn at random: a few rounds of `tests.remote.rounds`."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

import pytest

from tests.support.programs import TREE
from tests.support.share import share

ROUNDS: Final = 19
"""As many as it takes until each disaster has happened."""

DISASTERS: Final = frozenset(
    {
        *("kill", "flip", "cut", "remove", "two_processes", "overwrite", "damage_in_use"),
        *("rot_in_use", "rot_between_processes", "fault", "full", "read_only", "limit", "others"),
    }
)
ON_TMPFS: Final = frozenset({"full: on a tmpfs", "read-only: on a tmpfs"})


def may_mount() -> bool:
    """Return whether this process can mount a tmpfs: its user is root."""
    return not os.geteuid()


@pytest.mark.parametrize("seed", range(share(2, of=4)))
def test_rounds(seed: int) -> None:
    """Each read after a disaster has the right bytes or fails, and later reads are right."""
    words = ["--rounds", str(ROUNDS), "--seed", str(seed)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.remote.rounds", *words],
        cwd=TREE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ROUNDS} rounds: all bytes right" in done.stdout
    happened = {line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}
    assert happened >= DISASTERS
    if may_mount():
        assert happened >= ON_TMPFS
