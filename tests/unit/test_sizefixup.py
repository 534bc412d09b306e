"""Correcting the kernel's cached size of a disk."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import trio

from qedfuse.mount.fuse import sizefixup
from qedfuse.mount.fuse.exporteddisk import ExportedDisk
from qedfuse.mount.fuse.sizefixup import SizeFixup

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.disk.disk import Disk


def disk_of(size: int, name: str = "vm.raw", inode: int = 2) -> ExportedDisk:
    """Return a file of a mount whose disk has only a size, in bytes."""
    disk = cast("Disk", SimpleNamespace(size=size, name=name))
    return ExportedDisk(disk, os.fsencode(name), inode)


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
    fixup._correct(os.fsencode(path), expected, disk_of(5), may_shrink=True)
    assert path.stat().st_size == (10 if wrong_device or wrong_inode else 5)


@pytest.mark.parametrize(
    ("cached", "may_shrink", "corrected"), [(10, True, 5), (10, False, 10), (3, False, 5)]
)
def test_a_cached_size_is_made_smaller_only_after_a_failed_write(
    tmp_path: Path, cached: int, corrected: int, *, may_shrink: bool
) -> None:
    """A size that can only be too small stays if it is larger: writes under way have made it so."""
    path = tmp_path / "vm.raw"
    path.write_bytes(bytes(cached))
    status = path.stat()
    fixup = SizeFixup(str(tmp_path), is_directory=True)
    exported = disk_of(5)
    fixup._correct(
        os.fsencode(path), (status.st_dev, status.st_ino), exported, may_shrink=may_shrink
    )
    assert path.stat().st_size == corrected


def test_the_size_is_read_after_the_accepted_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes that the kernel sends before the truncation grow the disk, and their bytes stay."""
    path = tmp_path / "vm.raw"
    path.write_bytes(bytes(10))
    status = path.stat()
    exported = disk_of(5)

    def write_back(_mountpoint: str) -> None:
        exported.disk.size = 8  # type: ignore[misc]

    monkeypatch.setattr(sizefixup, "sync_mount", write_back)
    fixup = SizeFixup(str(tmp_path), is_directory=True)
    fixup._correct(os.fsencode(path), (status.st_dev, status.st_ino), exported, may_shrink=True)
    assert path.stat().st_size == exported.fixup_size == 8


async def test_a_refused_correction_is_repeated_if_the_disk_has_grown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk grows between the reading of its size and the request, the next size counts."""
    path = tmp_path / "vm.raw"
    path.write_bytes(bytes(10))
    status = path.stat()
    exported = disk_of(5, path.name, status.st_ino)
    fixup = SizeFixup(str(tmp_path), is_directory=True)
    truncate = os.truncate
    sizes: list[int] = []
    done = trio.Event()

    def refuse_first(name: str, size: int) -> None:
        sizes.append(size)
        if len(sizes) == 1:
            exported.disk.size = 8  # type: ignore[misc]
            raise PermissionError
        truncate(name, size)
        trio.from_thread.run_sync(done.set)

    monkeypatch.setattr(os, "truncate", refuse_first)
    async with trio.open_nursery() as nursery:
        device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
        nursery.start_soon(fixup.run, device)
        fixup.request(exported)
        await done.wait()
        nursery.cancel_scope.cancel()
    assert sizes == [5, 8]
    assert path.stat().st_size == 8
