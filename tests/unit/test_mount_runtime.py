"""The notes by which ``qedfuse umount`` finds a process, and who is trusted to write them."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING

import pytest

from qedfuse.errors import HostError, PrivilegeError
from qedfuse.mount import runtime
from qedfuse.mount.notify import notify_systemd, remove_pidfile, write_pidfile
from qedfuse.mount.runtime import MountNote, NoteKeeper, find_note, process_start, read_note

if TYPE_CHECKING:
    from pathlib import Path

USER = os.geteuid()
DEVICE = "0:42"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep notes in a directory of the test's own."""
    path = tmp_path / "notes"
    monkeypatch.setattr(runtime, "directories", lambda _user: [path])
    return path


def own_note(started: int | None = None) -> MountNote:
    """Make a note about this process."""
    start = process_start(os.getpid()) if started is None else started
    assert start is not None
    return MountNote(os.getpid(), start, "/mnt", ("/vm.qed",))


def test_processes_have_a_start() -> None:
    """A process that is there has one, any other none."""
    start = process_start(os.getpid())
    assert start is not None
    assert start > 0
    assert process_start(2**30) is None


def test_a_note_is_found_until_the_end(place: Path) -> None:
    """It says what it was made with, and a good end removes it."""
    keeper = NoteKeeper(DEVICE, own_note())
    assert place.stat().st_mode & 0o777 == 0o700
    found = find_note(DEVICE, USER)
    assert found is not None
    assert found[1] == own_note()
    assert find_note("0:4", USER) is None
    keeper.finish(None, 0)
    assert find_note(DEVICE, USER) is None
    assert read_note(found[0], USER) is None


def test_a_failure_stays_in_the_note() -> None:
    """Whoever waited for the process learns why and how it ended."""
    keeper = NoteKeeper(DEVICE, own_note())
    keeper.finish("the host is full", 2)
    found = find_note(DEVICE, USER)
    assert found is not None
    assert (found[1].failure, found[1].exit_code) == ("the host is full", 2)


def test_the_latest_note_counts(place: Path) -> None:
    """A device number is given away again before its last process has ended."""
    NoteKeeper(DEVICE, own_note())
    text = (place / f"{DEVICE}.{os.getpid()}").read_text()
    older = json.loads(text) | {"mountpoint": "/older", "started": 1}
    (place / f"{DEVICE}.1").write_text(json.dumps(older))
    found = find_note(DEVICE, USER)
    assert found is not None
    assert found[1].mountpoint == "/mnt"


def test_notes_of_killed_processes_are_swept(place: Path) -> None:
    """Nobody else would remove them."""
    place.mkdir(mode=0o700)
    dead = {"pid": os.getpid(), "started": 1, "mountpoint": "", "sources": []}
    (place / "0:7.3").write_text(json.dumps(dead))
    NoteKeeper(DEVICE, own_note())
    assert not (place / "0:7.3").exists()


def test_unsafe_directories_are_refused(place: Path) -> None:
    """Where others can write, they could name any process."""
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(PrivilegeError, match="others can write"):
        NoteKeeper(DEVICE, own_note())
    assert find_note(DEVICE, USER) is None


def test_links_are_not_followed(place: Path, tmp_path: Path) -> None:
    """Neither the directory nor a note may be a link."""
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    place.symlink_to(other)
    with pytest.raises(HostError):
        NoteKeeper(DEVICE, own_note())
    place.unlink()
    place.mkdir(mode=0o700)
    (tmp_path / "note").write_text('{"pid":1,"started":1,"mountpoint":"","sources":[]}')
    (place / f"{DEVICE}.1").symlink_to(tmp_path / "note")
    assert find_note(DEVICE, USER) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": 1}', "\udcff", "9" * 5000])
def test_broken_notes_are_passed_over(place: Path, text: str) -> None:
    """What makes no sense is no note."""
    place.mkdir(mode=0o700)
    (place / f"{DEVICE}.1").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert find_note(DEVICE, USER) is None


def test_pid_files(tmp_path: Path) -> None:
    """The file holds our number and is removed only while it is about us."""
    path = tmp_path / "pid"
    write_pidfile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    remove_pidfile(str(path))
    assert not path.exists()
    path.write_text("1\n")
    remove_pidfile(str(path))
    assert path.exists()
    remove_pidfile(str(tmp_path / "none"))
    with pytest.raises(HostError, match="cannot write the pid file"):
        write_pidfile(str(tmp_path / "none" / "pid"))


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_notified(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    abstract: bool,  # noqa: FBT001
) -> None:
    """The line arrives at both kinds of socket."""
    name = f"@{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0", 1))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        notify_systemd("READY=1")
        assert manager.recv(100) == b"READY=1"
    notify_systemd("STOPPING=1")  # nobody listens any more
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify_systemd("READY=1")
