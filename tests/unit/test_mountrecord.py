"""Mount records: how ``qedfuse umount`` finds a process, and whose records it trusts."""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import pytest

from qedfuse.errors import HostError, PrivilegeError
from qedfuse.mount.system import recordfile, recordlookup
from qedfuse.mount.system.mountrecord import (
    MountRecord,
    has_ended,
    process_start,
    read_record,
)
from qedfuse.mount.system.mounttable import read_mounts
from qedfuse.mount.system.recordfile import MountRecordFile
from qedfuse.mount.system.recordlookup import find_record, take_record
from qedfuse.util.descriptors import open_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable

USER = os.geteuid()
DEVICE = "0:42"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep records in a directory of the test's own."""
    path = tmp_path / "records"
    for module in (recordfile, recordlookup):
        monkeypatch.setattr(module, "record_directories", lambda _user: [path])
    return path


def own_record(started: int | None = None) -> MountRecord:
    """Make a record of this process."""
    start = process_start(os.getpid()) if started is None else started
    assert start is not None
    return MountRecord(os.getpid(), start, "/mnt", ("/vm.qed",))


def write_record() -> MountRecordFile:
    """Write a record of this process."""
    file = MountRecordFile()
    file.write(DEVICE, own_record())
    return file


def test_processes_have_a_start() -> None:
    """A running process has a start time, and any other has none."""
    start = process_start(os.getpid())
    assert start is not None
    assert start > 0
    assert process_start(2**30) is None


def failing(number: int) -> Callable[..., NoReturn]:
    """Return a function that fails with an errno."""

    def fail(*_arguments: object, **_options: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def test_an_unreadable_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process does not count as ended because its start time cannot be read."""
    monkeypatch.setattr(Path, "read_text", failing(errno.EMFILE))
    with pytest.raises(HostError, match="stat: cannot read: Too many open files"):
        process_start(os.getpid())
    with pytest.raises(HostError):
        has_ended(MountRecord(os.getpid(), 1, "/mnt", ()))


def test_a_server_has_ended_if_its_pid_has_another_start() -> None:
    """The start time of a record decides whether the process with its pid is the server."""
    record = own_record()
    assert not has_ended(record)
    assert has_ended(replace(record, started=record.started - 1))
    assert not has_ended(replace(record, started=0))
    assert has_ended(replace(record, pid=2**22))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_an_unreadable_record_is_not_missing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that cannot be read is an error, unless another record was found."""
    file = write_record()
    found = find_record(DEVICE, USER)
    assert found is not None
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", failing(number))
        with pytest.raises(HostError, match="cannot read the mount record"):
            find_record(DEVICE, USER)
        with pytest.raises(HostError, match="cannot read the mount record"):
            take_record(found.path, USER)
    assert take_record(found.path, USER) == found.record
    file.finish(None, 0)


def test_a_record_from_before_the_boot_hides_no_other(directory: Path) -> None:
    """Of two records for one device number, that of a server that runs is found.

    The times of the other one can be later, because they are counted from another boot.
    """
    file = write_record()
    found = find_record(DEVICE, USER)
    assert found is not None
    record = found.record
    old = replace(record, started=record.started + 10**6, mounted=record.mounted + 10**12)
    assert has_ended(old)
    stale = directory / f"{DEVICE}.1"
    stale.write_bytes(found.path.read_bytes())
    stale.chmod(found.path.stat().st_mode)
    content = json.loads(stale.read_bytes())
    assert content["started"] == record.started
    content.update(started=old.started, mounted=old.mounted)
    stale.write_text(json.dumps(content))
    assert find_record(DEVICE, USER) == found
    file.finish(None, 0)


def test_an_unreadable_record_hides_no_other(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two records for one device number the one that can be read is found."""
    write_record().finish("failed", 2)
    found = find_record(DEVICE, USER)
    assert found is not None
    unreadable = directory / f"{DEVICE}.1"
    unreadable.touch()
    real, refused = os.open, []

    def fail(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == unreadable.name:
            refused.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", fail)
    for names in ([found.path.name, unreadable.name], [unreadable.name, found.path.name]):
        monkeypatch.setattr(os, "listdir", lambda _fd, names=names: names)
        assert find_record(DEVICE, USER) == found
    assert len(refused) == 2
    monkeypatch.setattr(os, "listdir", lambda _fd: [unreadable.name])
    with pytest.raises(HostError, match="cannot read the mount record"):
        find_record(DEVICE, USER)


def test_the_records_of_a_readable_directory_count(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that cannot be read does not matter if another one has the record."""
    write_record().finish("failed", 2)
    loop = tmp_path / "loop" / "records"
    loop.parent.symlink_to(loop.parent)
    unreadable = tmp_path / ("x" * 300) / "records"
    monkeypatch.setattr(
        recordlookup, "record_directories", lambda _user: [loop, unreadable, directory]
    )
    assert find_record(DEVICE, USER) is not None
    with pytest.raises(HostError, match="File name too long"):
        find_record("0:1", USER)
    monkeypatch.setattr(recordlookup, "record_directories", lambda _user: [loop])
    assert find_record("0:1", USER) is None


def test_a_directory_is_no_record(directory: Path) -> None:
    """A directory or a FIFO in place of a record is skipped."""
    file = write_record()
    (directory / f"{DEVICE}.1").mkdir()
    os.mkfifo(directory / f"{DEVICE}.2")
    found = find_record(DEVICE, USER)
    assert found is not None
    assert found.record == own_record()
    file.finish(None, 0)
    assert find_record(DEVICE, USER) is None


def test_a_record_that_cannot_be_written_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed write keeps the record as it was, and leaves no other file."""
    file = MountRecordFile()
    for module, name, replacement in (
        (recordfile, "open", full_file),
        (os, "rename", failing(errno.EIO)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, replacement, raising=False)
            with pytest.raises(HostError, match="cannot write the mount record"):
                file.write(DEVICE, own_record())
        assert list(directory.iterdir()) == []
    file.write(DEVICE, own_record())
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", failing(errno.EIO))
        file.finish("failed", 2)
    found = find_record(DEVICE, USER)
    assert found is not None
    assert found.record == own_record()
    assert len(list(directory.iterdir())) == 1


def full_file(descriptor: int, _mode: str) -> BinaryIO:
    """Open /dev/full in place of a descriptor."""
    os.close(descriptor)
    return Path("/dev/full").open("wb")


def test_unfinished_records_of_killed_servers_are_removed(directory: Path) -> None:
    """A mount removes a file that a server was writing when it was killed, and no other file."""
    directory.mkdir(mode=0o700)
    stale, own, other = (
        directory / name
        for name in (f"{DEVICE}.{2**22}.new", f"{DEVICE}.{os.getpid()}.new", "notes.new")
    )
    for path in (stale, own, other):
        path.write_text('{"pid":')
    MountRecordFile().finish(None, 0)
    assert sorted(directory.iterdir()) == sorted([own, other])


def test_a_failed_removal_of_old_records_does_not_matter(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount gets its record, and closes its directory, although old records cannot be listed."""
    before = open_descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", failing(errno.EIO))
        patched.setattr(recordfile, "read_mounts", failing(errno.EMFILE))
        file = MountRecordFile()
    file.write(DEVICE, own_record())
    assert len(list(directory.iterdir())) == 1
    file.finish(None, 0)
    assert open_descriptors() == before


def test_a_record_is_found_until_the_end(directory: Path) -> None:
    """A record has the values it was made with, and a clean end removes it."""
    file = write_record()
    assert directory.stat().st_mode & 0o777 == 0o700
    found = find_record(DEVICE, USER)
    assert found is not None
    assert found.record == own_record()
    assert find_record("0:4", USER) is None
    file.finish(None, 0)
    assert find_record(DEVICE, USER) is None
    assert take_record(found.path, USER) is None


def test_a_failure_stays_in_the_record() -> None:
    """A failed process leaves its message and exit code in the record."""
    file = write_record()
    file.finish("the host is full", 2)
    found = find_record(DEVICE, USER)
    assert found is not None
    assert (found.record.failure, found.record.exit_code) == ("the host is full", 2)


def test_the_latest_record_counts(directory: Path) -> None:
    """Of several records for a device number the latest one is used."""
    write_record()
    text = (directory / f"{DEVICE}.{os.getpid()}").read_text()
    older = json.loads(text) | {"mountpoint": "/older", "started": 1}
    (directory / f"{DEVICE}.1").write_text(json.dumps(older))
    found = find_record(DEVICE, USER)
    assert found is not None
    assert found.record.mountpoint == "/mnt"


def test_the_time_of_the_mount_decides(directory: Path) -> None:
    """The record of the mount that was made last is used, although its server started first."""
    directory.mkdir(mode=0o700)
    for pid, started, mounted in ((1, 500, 1000), (2, 100, 2000), (3, 400, 0)):
        record = {"pid": pid, "started": started, "mountpoint": "", "sources": []}
        text = json.dumps(record | ({"mounted": mounted} if mounted else {}))
        (directory / f"{DEVICE}.{pid}").write_text(text)
    found = find_record(DEVICE, USER)
    assert found is not None
    assert found.record.pid == 2


def write_stale_record(directory: Path, device: str) -> Path:
    """Write the record of a process that was killed."""
    directory.mkdir(mode=0o700)
    dead = {"pid": os.getpid(), "started": 1, "mountpoint": "", "sources": []}
    path = directory / f"{device}.3"
    path.write_text(json.dumps(dead))
    return path


def test_records_of_killed_processes_are_removed_after_a_minute(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount keeps the record of a killed process; one that starts a minute later removes it."""
    path = write_stale_record(directory, "9999:1")
    for _ in range(2):
        write_record()
        assert find_record("9999:1", USER) is not None
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    write_record()
    assert not path.exists()


def test_the_record_of_a_killed_process_stays_until_its_mount_is_gone(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the mount table shows the device, the record of a killed process stays."""
    path = write_stale_record(directory, read_mounts()[0].device)
    write_record()
    assert path.stat().st_mode & 0o777 != 0o400
    path.chmod(0o400)
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    write_record()
    assert path.exists()


def test_unsafe_directories_are_refused(directory: Path) -> None:
    """A directory of records that other users can write to is refused."""
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(PrivilegeError, match="another user owns or can write to"):
        write_record()
    assert find_record(DEVICE, USER) is None


def test_links_are_not_followed(directory: Path, tmp_path: Path) -> None:
    """A symbolic link as directory or as record is not followed."""
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    directory.symlink_to(other)
    with pytest.raises(HostError):
        write_record()
    directory.unlink()
    directory.mkdir(mode=0o700)
    (tmp_path / "record").write_text('{"pid":1,"started":1,"mountpoint":"","sources":[]}')
    (directory / f"{DEVICE}.1").symlink_to(tmp_path / "record")
    assert find_record(DEVICE, USER) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"pid": 1}', "\udcff", "9" * 5000, "[" * 100_000, "null", "1"]
)
def test_malformed_records_are_skipped(directory: Path, text: str) -> None:
    """Malformed records are skipped."""
    directory.mkdir(mode=0o700)
    (directory / f"{DEVICE}.1").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert find_record(DEVICE, USER) is None


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("pid", [0, -1, 1 << 80, 1.0, "1", True, None, []]),
        ("started", [-1, 1 << 80, 1.0, "1", False, None]),
        ("mounted", [-1, 1 << 80, 1.0, "1", False, None]),
        ("mountpoint", [1, None, ["/mnt"]]),
        ("sources", ["/vm.qed", [1], [["a"]], None, {"a": 1}, 1]),
        ("options", ["ro", [1], None, {"a": 1}]),
        ("failure", [1, ["a"], True]),
        ("exit_code", [-1, 256, "2", True, None]),
        ("other", [1]),
    ],
)
def test_a_record_with_a_wrong_field_is_skipped(
    directory: Path, field: str, values: list[object]
) -> None:
    """A record with any field of a wrong type or value is skipped."""
    directory.mkdir(mode=0o700)
    right = {"pid": 1, "started": 1, "mountpoint": "/mnt", "sources": ["/vm.qed"], "options": []}
    path = directory / f"{DEVICE}.1"
    path.write_text(json.dumps(right))
    assert find_record(DEVICE, USER) is not None
    for value in values:
        path.write_text(json.dumps({**right, field: value}))
        assert find_record(DEVICE, USER) is None, value


def test_a_record_is_removed_from_the_checked_directory(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record is removed by the descriptor of the directory that was checked."""
    write_record().finish("failed", 2)
    name = f"{DEVICE}.{os.getpid()}"
    other = tmp_path / "other"
    other.mkdir()
    (other / name).touch()
    read = read_record

    def read_and_swap(opened: int, name: str, user: int) -> MountRecord | None:
        record = read(opened, name, user)
        directory.rename(tmp_path / "moved")
        directory.symlink_to(other)
        return record

    monkeypatch.setattr(recordlookup, "read_record", read_and_swap)
    record = take_record(directory / name, USER)
    assert record is not None
    assert (record.failure, record.exit_code) == ("failed", 2)
    assert (other / name).exists()
    assert not (tmp_path / "moved" / name).exists()


def test_a_record_works_in_a_hidden_directory(directory: Path, tmp_path: Path) -> None:
    """A record is updated and removed although a mount hides its directory."""
    file = MountRecordFile()
    directory.rename(tmp_path / "elsewhere")
    file.write(DEVICE, own_record())
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == [f"{DEVICE}.{os.getpid()}"]
    file.finish(None, 0)
    assert list((tmp_path / "elsewhere").iterdir()) == []
