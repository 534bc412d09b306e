"""Correcting the kernel's cached size of a disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from qedfuse.mount.fuse.sizefixup import SizeFixup

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("wrong_device", "wrong_inode"), [(0, 0), (0, 1), (1, 0)])
def test_another_file_of_the_name_is_not_truncated(
    tmp_path: Path, wrong_device: int, wrong_inode: int
) -> None:
    """Only the file whose size is wrong is truncated, and not a later one of the same name."""
    path = tmp_path / "vm.raw.p1"
    path.write_bytes(bytes(10))
    status = path.stat()
    expected = (status.st_dev + wrong_device, status.st_ino + wrong_inode)
    fixup = SizeFixup(str(tmp_path), is_directory=True)
    fixup._correct(os.fsencode(path), expected, 5)
    assert path.stat().st_size == (10 if wrong_device or wrong_inode else 5)
