"""Mounting on a host that has no free descriptor for it."""

from __future__ import annotations

import errno
import os
import select
import socket
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
import trio

from qedfuse.errors import FuseError, HostError
from qedfuse.mount.fuse.attach import attach
from qedfuse.mount.fuse.fuseinit import negotiate_init
from qedfuse.mount.serving import _call_at_end

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

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


@pytest.mark.parametrize("owner", [(os, "dup"), (socket, "socketpair")])
def test_a_negotiation_without_free_descriptors_fails(
    owner: tuple[ModuleType, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is a FuseError, and no descriptor stays open."""
    reading, writing = os.pipe()
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    caught: list[FuseError] = []

    async def negotiate() -> None:
        monkeypatch.setattr(*owner, refuse)
        try:
            await negotiate_init(reading)
        except FuseError as error:
            caught.append(error)
        monkeypatch.undo()

    trio.run(negotiate)
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    os.close(reading)
    os.close(writing)
    reason = "cannot negotiate FUSE_INIT with the kernel: Too many open files"
    assert [str(error) for error in caught] == [f"/dev/fuse: {reason}"]


def test_a_connection_that_cannot_be_watched_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the mountpoint and has the errno; the action is not called."""
    called: list[bool] = []

    async def watch() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(select, "epoll", refuse)
            await _call_at_end(-1, "/mnt", lambda: called.append(True))

    with pytest.raises(HostError) as caught:
        trio.run(watch)
    assert str(caught.value) == "/mnt: cannot mount: Too many open files"
    assert (caught.value.errno, caught.value.exit_code, called) == (errno.EMFILE, 2, [])
