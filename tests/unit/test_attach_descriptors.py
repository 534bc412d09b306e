"""Mounting on a host that has no free descriptor for it."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from qedfuse.errors import HostError
from qedfuse.mount.fuse.attach import attach

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.mount.fuse.operations import Operations
    from qedfuse.mount.options import MountOptions


def refuse(*_: object) -> int:
    """Fail as a system call of a process without free descriptors."""
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("name", ["dup", "memfd_create", "listdir"])
def test_a_mount_without_free_descriptors_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the mountpoint and has the errno; no descriptor stays open."""
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  numbers, not paths
    operations = cast("Operations", SimpleNamespace())
    options = cast("MountOptions", SimpleNamespace())
    with monkeypatch.context() as patch:
        patch.setattr(os, name, refuse)
        with pytest.raises(HostError) as caught:
            attach(operations, str(tmp_path), options, "source")
    assert str(caught.value) == f"{tmp_path}: cannot mount: Too many open files"
    assert (caught.value.errno, caught.value.exit_code) == (errno.EMFILE, 2)
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
