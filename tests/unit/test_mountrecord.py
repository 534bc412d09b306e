"""Mount records: how ``qedfuse umount`` finds a process, and whose records it trusts."""

from __future__ import annotations

import json
import os
import socket
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest

from qedfuse.errors import HostError, PrivilegeError
from qedfuse.mount.process.pidfile import PidFile
from qedfuse.mount.process.servicemanager import ServiceManager
from qedfuse.mount.system import mountrecord
from qedfuse.mount.system.mountrecord import (
    MountRecord,
    MountRecordFile,
    find_record,
    process_start,
    take_record,
)

if TYPE_CHECKING:
    from pathlib import Path

USER = os.geteuid()
DEVICE = "0:42"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep notes in a directory of the test's own."""
    path = tmp_path / "notes"
    monkeypatch.setattr(mountrecord, "record_directories", lambda _user: [path])
    return path


def own_note(started: int | None = None) -> MountRecord:
    """Make a note about this process."""
    start = process_start(os.getpid()) if started is None else started
    assert start is not None
    return MountRecord(os.getpid(), start, "/mnt", ("/vm.qed",))


def keep_note() -> MountRecordFile:
    """Write a note about this process."""
    keeper = MountRecordFile()
    keeper.write(DEVICE, own_note())
    return keeper


def test_processes_have_a_start() -> None:
    """A running process has a start time, and any other has none."""
    start = process_start(os.getpid())
    assert start is not None
    assert start > 0
    assert process_start(2**30) is None


def test_a_record_is_found_until_the_end(place: Path) -> None:
    """A record has the values it was made with, and a clean end removes it."""
    keeper = keep_note()
    assert place.stat().st_mode & 0o777 == 0o700
    found = find_record(DEVICE, USER)
    assert found is not None
    assert found[1] == own_note()
    assert find_record("0:4", USER) is None
    keeper.finish(None, 0)
    assert find_record(DEVICE, USER) is None
    assert take_record(found[0], USER) is None


def test_a_failure_stays_in_the_record() -> None:
    """A failed process leaves its message and exit code in the record."""
    keeper = keep_note()
    keeper.finish("the host is full", 2)
    found = find_record(DEVICE, USER)
    assert found is not None
    assert (found[1].failure, found[1].exit_code) == ("the host is full", 2)


def test_the_latest_record_counts(place: Path) -> None:
    """Of several records for a device number the latest one is used."""
    keep_note()
    text = (place / f"{DEVICE}.{os.getpid()}").read_text()
    older = json.loads(text) | {"mountpoint": "/older", "started": 1}
    (place / f"{DEVICE}.1").write_text(json.dumps(older))
    found = find_record(DEVICE, USER)
    assert found is not None
    assert found[1].mountpoint == "/mnt"


def test_records_of_killed_processes_are_removed(place: Path) -> None:
    """Records of killed processes are removed."""
    place.mkdir(mode=0o700)
    dead = {"pid": os.getpid(), "started": 1, "mountpoint": "", "sources": []}
    (place / "0:7.3").write_text(json.dumps(dead))
    keep_note()
    assert not (place / "0:7.3").exists()


def test_unsafe_directories_are_refused(place: Path) -> None:
    """A directory of records that other users can write to is refused."""
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(PrivilegeError, match="others can write"):
        keep_note()
    assert find_record(DEVICE, USER) is None


def test_links_are_not_followed(place: Path, tmp_path: Path) -> None:
    """A symbolic link as directory or as record is not followed."""
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    place.symlink_to(other)
    with pytest.raises(HostError):
        keep_note()
    place.unlink()
    place.mkdir(mode=0o700)
    (tmp_path / "note").write_text('{"pid":1,"started":1,"mountpoint":"","sources":[]}')
    (place / f"{DEVICE}.1").symlink_to(tmp_path / "note")
    assert find_record(DEVICE, USER) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"pid": 1}', "\udcff", "9" * 5000, "[" * 100_000, "null", "1"]
)
def test_malformed_records_are_skipped(place: Path, text: str) -> None:
    """Malformed records are skipped."""
    place.mkdir(mode=0o700)
    (place / f"{DEVICE}.1").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert find_record(DEVICE, USER) is None


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("pid", [0, -1, 1 << 80, 1.0, "1", True, None, []]),
        ("started", [-1, 1 << 80, 1.0, "1", False, None]),
        ("mountpoint", [1, None, ["/mnt"]]),
        ("sources", ["/vm.qed", [1], [["a"]], None, {"a": 1}, 1]),
        ("options", ["ro", [1], None, {"a": 1}]),
        ("failure", [1, ["a"], True]),
        ("exit_code", [-1, 256, "2", True, None]),
        ("other", [1]),
    ],
)
def test_a_record_with_a_wrong_field_is_skipped(
    place: Path, field: str, values: list[object]
) -> None:
    """A record with any field of a wrong type or value is skipped."""
    place.mkdir(mode=0o700)
    right = {"pid": 1, "started": 1, "mountpoint": "/mnt", "sources": ["/vm.qed"], "options": []}
    path = place / f"{DEVICE}.1"
    path.write_text(json.dumps(right))
    assert find_record(DEVICE, USER) is not None
    for value in values:
        path.write_text(json.dumps({**right, field: value}))
        assert find_record(DEVICE, USER) is None, value


def test_a_record_is_removed_from_the_checked_directory(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record is removed by the descriptor of the directory that was checked."""
    keep_note().finish("failed", 2)
    name = f"{DEVICE}.{os.getpid()}"
    other = tmp_path / "other"
    other.mkdir()
    (other / name).touch()
    read = mountrecord._read

    def read_and_swap(directory: int, name: str, user: int) -> MountRecord | None:
        note = read(directory, name, user)
        place.rename(tmp_path / "moved")
        place.symlink_to(other)
        return note

    monkeypatch.setattr(mountrecord, "_read", read_and_swap)
    note = take_record(place / name, USER)
    assert note is not None
    assert (note.failure, note.exit_code) == ("failed", 2)
    assert (other / name).exists()
    assert not (tmp_path / "moved" / name).exists()


def test_a_record_works_in_a_hidden_directory(place: Path, tmp_path: Path) -> None:
    """A record is updated and removed although a mount hides its directory."""
    keeper = MountRecordFile()
    place.rename(tmp_path / "elsewhere")
    keeper.write(DEVICE, own_note())
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == [f"{DEVICE}.{os.getpid()}"]
    keeper.finish(None, 0)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_pid_files(tmp_path: Path) -> None:
    """A pid file has the process id, and is removed only while it still has it."""
    path = tmp_path / "pid"
    with closing(PidFile(str(path))) as file:
        assert not path.exists(), "the disk cannot be used yet"
        file.write()
        assert path.read_text() == f"{os.getpid()}\n"
        file.remove()
        assert not path.exists()
        file.remove()
        path.write_text("1\n")
        file.remove()
        assert path.exists()
        path.unlink()
        path.symlink_to(tmp_path / "other")
        file.write()
        assert path.read_text() == f"{os.getpid()}\n"
        assert not path.is_symlink()
        assert not (tmp_path / "other").exists(), "a link that came meanwhile was followed"
    for name in ("none/pid", "."):
        with pytest.raises(HostError, match="cannot write the pid file"):
            PidFile(str(tmp_path / name))


def test_a_pid_file_works_in_a_hidden_directory(tmp_path: Path) -> None:
    """A pid file is removed although a mount hides its directory."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run/pid")
    with closing(PidFile(str(tmp_path / "link"))) as file:
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        file.write()
        assert (tmp_path / "elsewhere" / "pid").read_text() == f"{os.getpid()}\n"
        file.remove()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_pid_file_may_be_a_pipe(tmp_path: Path) -> None:
    """A pid file may be a named or an inherited pipe, which is not removed."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reading, writing = os.pipe()
    named = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    for name, end in ((str(fifo), named), (f"/proc/self/fd/{writing}", reading)):
        with closing(PidFile(name)) as file:
            file.write()
            assert os.read(end, 100) == b"%d\n" % os.getpid()
            file.remove()
    assert fifo.exists()
    for fd in (reading, writing, named):
        os.close(fd)


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_notified(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    abstract: bool,  # noqa: FBT001
) -> None:
    """Systemd gets its line at both kinds of socket, although a mount hides the path."""
    name = f"@{tmp_path}" if abstract else str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    with closing(ServiceManager()) as nobody:
        nobody.notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1))
        manager = ServiceManager()
        if not abstract:
            (tmp_path / "notify").unlink()
        manager.notify("READY=1")
        assert listener.recv(100) == b"READY=1"
    with closing(manager):
        manager.notify("STOPPING=1")  # nobody listens any more
    monkeypatch.delenv("NOTIFY_SOCKET")
    with closing(ServiceManager()) as nobody:
        nobody.notify("READY=1")


def test_a_slow_service_manager_gets_all_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service manager that reads late gets all lines in order, and does not block the mount."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        with closing(ServiceManager()) as manager:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
                other.connect(str(tmp_path / "notify"))
                other.settimeout(0)
                with suppress(BlockingIOError):
                    while True:
                        other.send(b"WATCHDOG=1")
            manager.notify("READY=1")
            manager.notify("STOPPING=1")
        received = [b""]
        while received[-1] != b"STOPPING=1":
            received.append(listener.recv(100))
    assert received[-3:] == [b"WATCHDOG=1", b"READY=1", b"STOPPING=1"]
