"""Fixtures of the tests of mounts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.mounted import clean_up
from tests.support.sandbox import make_environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def mnt(tmp_path: Path) -> Iterator[Path]:
    """Give an empty directory to mount on; clean up what is left there."""
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    clean_up(path)


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    """Give a directory with the programs of this tree in ``bin``, as pip installs them."""
    return make_environment(tmp_path / "installation")
