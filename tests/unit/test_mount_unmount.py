"""Failures while something is unmounted: what is raised, and which of two errors is kept."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn, cast

import pytest

from qedfuse.errors import FuseError, proc_missing
from qedfuse.mount import serving
from qedfuse.mount.commands import umount
from qedfuse.mount.process.unmounter import DirectUnmounter
from qedfuse.mount.system import unmount as module
from qedfuse.mount.system.mounttable import MountEntry

if TYPE_CHECKING:
    from pathlib import Path

PROC_MISSING, NO_DESCRIPTOR = proc_missing(), OSError(errno.EMFILE, os.strerror(errno.EMFILE))
"""How reading the mount table can fail."""


def entry_of(path: Path) -> MountEntry:
    """Return an entry of the mount table for a mount on ``path``."""
    return MountEntry(36, 35, "0:42", str(path), "fuse.qedfuse", "/a.qed", os.geteuid())


def undo(path: Path) -> None:
    """Undo a mount on ``path``, on which nothing is mounted."""
    server = SimpleNamespace(_unmounter=DirectUnmounter(str(path)))
    serving.Server._undo_mount(cast("serving.Server", server), entry_of(path))


def test_fusermount_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is a FuseError with the reason of the host."""
    program = tmp_path / "fusermount3"
    program.touch(mode=0o755)
    monkeypatch.setattr(module, "find_fusermount", lambda: str(program))
    with pytest.raises(FuseError) as caught:
        module.unmount_by_fusermount("/mnt", lazy=False)
    reason = "cannot start fusermount3: Exec format error"
    assert str(caught.value) == f"/mnt: cannot unmount: {reason}"


@pytest.mark.parametrize(
    ("script", "how"), [("kill -9 $$", "ended by SIGKILL"), ("exit 3", "ended with status 3")]
)
def test_fusermount_that_prints_no_reason(
    script: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says how the program has ended."""
    program = tmp_path / "fusermount3"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(module, "find_fusermount", lambda: str(program))
    with pytest.raises(FuseError, match=f"^/mnt: cannot unmount: fusermount3 {how}$"):
        module.unmount_by_fusermount("/mnt", lazy=False)


@pytest.mark.parametrize("failure", [PROC_MISSING, NO_DESCRIPTOR])
def test_umount_keeps_the_first_error(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the mount table cannot be read after a failed unmount, the error stays the same."""
    umount._unmount(str(tmp_path), entry_of(tmp_path))  # succeeds: the mount is gone
    failures = [failure]

    def fail(_mountpoint: str) -> NoReturn:
        raise failures.pop()

    monkeypatch.setattr(umount, "find_mount", fail)
    with pytest.raises(FuseError, match="cannot unmount"):
        umount._unmount(str(tmp_path), entry_of(tmp_path))
    assert not failures


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(PROC_MISSING, marks=pytest.mark.expect_log("found no proc file system")),
        pytest.param(NO_DESCRIPTOR, marks=pytest.mark.expect_log("Too many open files")),
    ],
)
def test_a_mount_table_that_cannot_be_read_is_logged(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a mount is undone, no error replaces the one for which it is undone."""

    def fail(_mountpoint: str) -> NoReturn:
        raise failure

    monkeypatch.setattr(serving, "find_mount", fail)
    undo(tmp_path)


@pytest.mark.expect_log("cannot unmount: ")
def test_a_mount_that_cannot_be_undone_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of the unmount itself is logged too."""
    monkeypatch.setattr(serving, "find_mount", lambda _mountpoint: entry_of(tmp_path))
    undo(tmp_path)
