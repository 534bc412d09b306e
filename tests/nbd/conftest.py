"""What surrounds tests of NBD exports: a file with random bytes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SIZE: Final = (5 << 20) + 4096


@pytest.fixture(scope="session")
def content() -> bytes:
    """Return the bytes of `exported`."""
    return random.Random(1).randbytes(SIZE)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    """Return a raw file for servers."""
    path = tmp_path_factory.mktemp("exported") / "raw"
    path.write_bytes(content)
    return path
