"""What both `qedfuse.create_image` and `tools.creation.create` promise about new images."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

import pytest
import trio

import qedfuse
from qedfuse.errors import HostError, ImageError, ImageInUseError, UsageError
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.ondisk.header import parse_header
from qedfuse.tools.editing.create import create

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def by_api(path: Path, *, overwrite: bool = False) -> None:
    """Create an image through `qedfuse.create_image`."""

    async def make() -> None:
        await qedfuse.create_image(str(path), 1 << 20, overwrite=overwrite)

    trio.run(make)


def by_tool(path: Path, *, overwrite: bool = False) -> None:
    """Create an image through the function behind qedimg create."""
    create(str(path), 1 << 20, overwrite=overwrite)


pytestmark = pytest.mark.parametrize("make", [by_api, by_tool])


def test_an_existing_file_is_kept(tmp_path: Path, make: Callable[..., None]) -> None:
    """An existing file is replaced only on request, and a special file never is."""
    path = tmp_path / "old.qed"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"old\.qed: exists already"):
        make(path)
    assert path.read_bytes() == b"precious"
    (tmp_path / "directory").mkdir()
    with pytest.raises(ImageError, match="found a directory, expected a regular file"):
        make(tmp_path / "directory", overwrite=True)


def test_an_image_in_use_is_never_replaced(tmp_path: Path, make: Callable[..., None]) -> None:
    """An image that is open is not replaced."""
    path = tmp_path / "vm.qed"
    make(path)
    before = path.read_bytes()
    with path.open("r+b") as holder:
        lock_image(holder.fileno(), LockMode.WRITE, "vm.qed")
        with pytest.raises(ImageInUseError):
            make(path, overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["vm.qed"]  # noqa: PTH208  names


@pytest.mark.parametrize("call", ["fsync", "ftruncate", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, make: Callable[..., None], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A failed creation leaves the old file under its name, and no temporary file."""
    path = tmp_path / "old.qed"
    path.write_bytes(b"precious")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(HostError, match=r"old\.qed: .*Input/output error"):
            make(path, overwrite=True)
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["old.qed"]  # noqa: PTH208  names


def test_the_name_is_durable_after_the_bytes(
    tmp_path: Path, make: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is durable before it gets its name, and the name is durable on return."""
    path = tmp_path / "new.qed"
    real, synced = os.fsync, []

    def fsync(fd: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        synced.append((is_directory, path.exists()))
        if not is_directory:
            header = os.pread(fd, 64, 0)
            parse_header(header, "new.qed").check_fits(os.fstat(fd).st_size, "new.qed")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    make(path)
    assert synced == [(False, False), (True, True)]
    assert os.listdir(tmp_path) == ["new.qed"]  # noqa: PTH208  names
