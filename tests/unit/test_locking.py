"""The image locks: which openers exclude each other, and how a conflict is reported."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qedfuse.errors import HostError, ImageInUseError
from qedfuse.hostio import locking
from qedfuse.hostio.locking import LockMode, lock_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """Open one file as often as a test likes; all are closed at the end."""
    path = tmp_path / "image"
    path.write_bytes(b"")
    descriptors: list[int] = []

    def again() -> int:
        descriptors.append(os.open(path, os.O_RDWR))
        return descriptors[-1]

    yield again
    for fd in descriptors:
        os.close(fd)


def locked_bytes(fd: int) -> set[int]:
    """List the bytes that a descriptor's open file description has locked."""
    table = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines()
    spans = [line.split()[7:9] for line in table if line.startswith("lock:")]
    # The kernel joins locks on neighbouring bytes.
    return {byte for first, last in spans for byte in range(int(first), int(last) + 1)}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (LockMode.WRITE, {100, 101, 103, 201, 203}),
        (LockMode.READ, {100, 201, 203}),
        (LockMode.SHARE, {100}),
    ],
)
def test_bytes_are_those_of_the_protocol(
    opened: Callable[[], int], mode: LockMode, expected: set[int]
) -> None:
    """Each mode locks exactly the bytes of QEMU's protocol."""
    fd = opened()
    lock_image(fd, mode, "image")
    assert locked_bytes(fd) == expected


@pytest.mark.parametrize("second", LockMode)
@pytest.mark.parametrize("first", LockMode)
def test_which_modes_exclude_each_other(
    opened: Callable[[], int], first: LockMode, second: LockMode
) -> None:
    """Two opens in one process exclude each other like two processes."""
    lock_image(opened(), first, "image")
    fd = opened()
    readers = {LockMode.READ, LockMode.SHARE}
    if LockMode.SHARE in (first, second) or {first, second} <= readers:
        lock_image(fd, second, "image")
        assert locked_bytes(fd) == set(second.taken)
    else:
        with pytest.raises(ImageInUseError, match=rf"\(pid {os.getpid()}\)"):
            lock_image(fd, second, "image")
        assert locked_bytes(fd) == set()


def test_closing_lets_the_next_one_in(opened: Callable[[], int], tmp_path: Path) -> None:
    """A lock ends with the last descriptor of its open file description."""
    fd = os.open(tmp_path / "image", os.O_RDWR)
    copy = os.dup(fd)
    lock_image(fd, LockMode.WRITE, "image")
    # Closing an unrelated descriptor of the file drops POSIX locks, but not these.
    os.close(os.open(tmp_path / "image", os.O_RDWR))
    os.close(fd)
    with pytest.raises(ImageInUseError):
        lock_image(opened(), LockMode.WRITE, "image")
    os.close(copy)
    lock_image(opened(), LockMode.WRITE, "image")


def test_message_is_one_line_with_file_lock_and_holder(opened: Callable[[], int]) -> None:
    """A conflict is one line with the file, the lock as in QEMU, and the process."""
    lock_image(opened(), LockMode.WRITE, "image")
    command = Path("/proc/self/comm").read_text(encoding="utf-8").strip()
    with pytest.raises(ImageInUseError) as caught:
        lock_image(opened(), LockMode.READ, "name")
    assert str(caught.value) == (
        f'name: in use: Failed to get shared "write" lock, held by {command} (pid {os.getpid()})'
    )


def test_reopened_descriptor_is_another_opener(opened: Callable[[], int]) -> None:
    """A reopened /proc/self/fd/N is another opener, and conflicts."""
    fd = opened()
    lock_image(fd, LockMode.WRITE, "image")
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        with pytest.raises(ImageInUseError):
            lock_image(again, LockMode.READ, "image")
    finally:
        os.close(again)


def test_posix_lock_is_found_too(opened: Callable[[], int]) -> None:
    """A POSIX lock of another process is a conflict."""
    writer = opened()
    fcntl.lockf(writer, fcntl.LOCK_SH, 1, 101)
    with pytest.raises(ImageInUseError, match=rf"\(pid {os.getpid()}\)"):
        lock_image(opened(), LockMode.READ, "image")


def test_exclusive_lock_of_a_stranger_is_a_conflict(opened: Callable[[], int]) -> None:
    """A foreign write lock over the whole file is reported without waiting, with its process."""
    flock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(opened(), fcntl.F_OFD_SETLK, flock)
    fd = opened()
    with pytest.raises(ImageInUseError, match=rf"held by .* \(pid {os.getpid()}\)"):
        lock_image(fd, LockMode.SHARE, "image")
    assert locked_bytes(fd) == set()


@pytest.mark.expect_log("not locked")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP])
def test_file_system_without_locks_gets_a_warning(
    opened: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """On a file system without byte locks the image opens, with one warning."""

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with caplog.at_level(logging.WARNING):
        lock_image(opened(), LockMode.WRITE, "image")
    assert [record.getMessage().split(":")[:2] for record in caplog.records] == [
        ["image", " not locked"]
    ]


def test_other_failures_are_the_host_s(
    opened: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other errors of the lock call raise a HostError."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(HostError, match=r"^image: cannot lock: ") as caught:
        lock_image(opened(), LockMode.WRITE, "image")
    assert caught.value.errno == errno.EIO


def test_a_conflict_whose_holder_cannot_be_asked_for_is_a_conflict(
    opened: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the kernel refuses to name the holder of a conflicting lock, no lock is held either."""
    holder, fd = opened(), opened()
    fcntl.fcntl(holder, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 103, 1, 0))
    real, refused = fcntl.fcntl, 0

    def refuse(fd: int, command: int, flock: bytes) -> bytes:
        nonlocal refused
        if command == fcntl.F_OFD_GETLK:
            refused += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, command, flock)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(ImageInUseError, match=rf"\(pid {os.getpid()}\)"):
        lock_image(fd, LockMode.WRITE, "image")
    assert refused == 1
    assert locked_bytes(fd) == set()


def test_no_conflict_no_scan(opened: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes are searched only after a conflict."""

    def scan(*_: object) -> list[object]:
        pytest.fail("scanned without a conflict")

    monkeypatch.setattr(locking, "holders", scan)
    lock_image(opened(), LockMode.READ, "image")
    lock_image(opened(), LockMode.READ, "image")
