"""examples/setup.sh reinstalls the project when, and only when, a build input has changed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "examples" / "setup.sh"

BUILD_INPUTS = ("pyproject.toml", "setup.py", "qedfuse/check/a.c", "qedfuse/mount/fuse/b.c")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a source tree with a Python that only records that it was called."""
    for name in BUILD_INPUTS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before\n")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho >>'{tmp_path}/calls'\n")
    python.chmod(0o755)
    (tmp_path / "examples").mkdir()
    shutil.copy(SETUP, tmp_path / "examples")
    return tmp_path


def installs(tree: Path) -> int:
    """Run ``install_project``; return how often it has installed the project so far."""
    script = '. examples/setup.sh; make_venv() { :; }; venv=$root/.venv; install_project ""'
    subprocess.run(["bash", "-eu", "-c", script], cwd=tree, check=True, capture_output=True)
    return len((tree / "calls").read_text().splitlines())


@pytest.mark.parametrize("name", BUILD_INPUTS)
def test_a_changed_build_input_is_installed_again(tree: Path, name: str) -> None:
    """Each build input, a C source at any depth included, causes one new installation."""
    assert (installs(tree), installs(tree)) == (1, 1)
    (tree / name).write_text("after\n")
    assert (installs(tree), installs(tree)) == (2, 2)
