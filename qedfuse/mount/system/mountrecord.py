"""A note for each mount, by which ``qedfuse umount`` finds the process that serves it.

    /run/qedfuse/0:42.1234       for root
    $XDG_RUNTIME_DIR/qedfuse/    for users, or /tmp/qedfuse-UID/ where that is not set

The name is the mount's device number, which the mount table tells even of a mount that
is dead or that may not be looked at, and the process: the kernel gives the device number
away again while the process is still closing its images.  The process removes its note
when everything is safely closed; if something went wrong at the end it leaves the reason
in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from qedfuse.errors import HostError, PrivilegeError
from qedfuse.text import printable

_MAX_NOTE: Final = 1 << 20
_MAX_PID: Final = 1 << 22
_MAX_TICKS: Final = (1 << 64) - 1
_MAX_EXIT_CODE: Final = 255


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What a process tells about the mount it serves.

    Attributes:
        pid: The process.
        started: When it started, in the kernel's ticks: pids are used again.
        mountpoint: Where the mount is.
        sources: The images in it.
        failure: What went wrong at the end, if something did.
        exit_code: The exit code that goes with it.
        options: The words of all ``-o``, with absolute paths.
    """

    pid: int
    started: int
    mountpoint: str
    sources: tuple[str, ...]
    failure: str | None = None
    exit_code: int = 0
    options: tuple[str, ...] = ()


def process_start(pid: int) -> int | None:
    """Tell when a process started, in ticks since boot; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold anything, so count from its end.
    return int(text.rpartition(")")[2].split()[19])


def directories(user: int) -> list[Path]:
    """List where the notes of a user's mounts may be, the preferred place first."""
    if user == 0:
        return [Path("/run/qedfuse")]
    places = [Path(f"/run/user/{user}"), Path("/tmp")]  # noqa: S108  checked before it is used
    names = [places[0] / "qedfuse", places[1] / f"qedfuse-{user}"]
    own = os.environ.get("XDG_RUNTIME_DIR")
    if own and user == os.getuid():
        names.insert(0, Path(own) / "qedfuse")
    return names


def _open_directory(path: Path, user: int, *, make: bool) -> int:
    """Open a directory of notes, and make sure that nobody else can write to it.

    Raises:
        OSError: It is not there and cannot be made.
        PrivilegeError: It is somebody else's, or open to others.
    """
    if make:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(fd)
    if found.st_uid != user or stat.S_IMODE(found.st_mode) & 0o022:
        os.close(fd)
        msg = f"{printable(path)}: found a directory that others can write to, expected our own"
        raise PrivilegeError(msg)
    return fd


class MountRecordFile:
    """Writes the note of one mount and takes it away at the end.

    The directory is opened before the mount exists: later its path may lead through the
    mount.
    """

    def __init__(self) -> None:
        """Open the directory of the notes, and remove those of processes that were killed.

        Raises:
            HostError: There is no directory for it and none can be made.
            PrivilegeError: The directory is not safe.
        """
        self._written: tuple[str, MountRecord] | None = None
        self._directory = self._choose()
        _sweep(self._directory)

    def write(self, device: str, note: MountRecord) -> None:
        """Write the note of the mount with the number ``device``.

        Raises:
            HostError: It cannot be written.
        """
        name = f"{device}.{note.pid}"
        self._write(name, note)
        self._written = (name, note)

    @staticmethod
    def _choose() -> int:
        """Open the first directory that can be used."""
        user = os.geteuid()
        failure: OSError | None = None
        for path in directories(user):
            try:
                return _open_directory(path, user, make=True)
            except OSError as error:
                failure = error
        raise HostError.from_os(failure or OSError(), str(path), "cannot keep the mount's note")

    def _write(self, name: str, note: MountRecord) -> None:
        """Put the note into its file, which readers see whole or not at all."""
        text = json.dumps(asdict(note)).encode()
        new = name + ".new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(new, flags, 0o600, dir_fd=self._directory)
            with open(fd, "wb") as file:  # noqa: PTH123
                file.write(text)
            os.rename(new, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError as error:
            raise HostError.from_os(error, name, "cannot keep the mount's note") from error

    def finish(self, failure: str | None, exit_code: int) -> None:
        """Remove the note if there is one, or leave in it what went wrong."""
        try:
            if self._written is None:
                return
            name, note = self._written
            if failure is None:
                os.unlink(name, dir_fd=self._directory)
            else:
                self._write(name, replace(note, failure=failure, exit_code=exit_code))
        except (OSError, HostError):
            pass  # the mount is gone either way, and nobody can be told here
        finally:
            os.close(self._directory)


def find_note(device: str, user: int) -> tuple[Path, MountRecord] | None:
    """Find the note of a mount that ``user`` has made; None if there is none to be trusted."""
    found = []
    for directory in directories(user):
        try:
            place = _open_directory(directory, user, make=False)
        except (OSError, PrivilegeError):
            continue
        try:
            for name in os.listdir(place):  # noqa: PTH208  of a descriptor
                if name.rpartition(".")[0] == device and (note := _read(place, name, user)):
                    found.append((directory / name, note))  # noqa: PERF401  two conditions
        finally:
            os.close(place)
    # An older one with the same number is about a mount that has gone.
    return max(found, key=lambda pair: pair[1].started, default=None)


def take_note(path: Path, user: int) -> MountRecord | None:
    """Read a note that was found before, and remove it; None if it is gone."""
    try:
        place = _open_directory(path.parent, user, make=False)
    except (OSError, PrivilegeError):
        return None
    try:
        note = _read(place, path.name, user)
        if note is not None:
            # By the descriptor: the user may put another directory in the place of this one.
            with contextlib.suppress(OSError):
                os.unlink(path.name, dir_fd=place)
        return note
    finally:
        os.close(place)


def _sweep(directory: int) -> None:
    """Remove the notes of processes that were killed."""
    for name in os.listdir(directory):
        note = _read(directory, name, os.geteuid())
        if note is not None and process_start(note.pid) != note.started:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=directory)


def _read(directory: int, name: str, user: int) -> MountRecord | None:
    """Read a note, if it is the user's own regular file and makes sense."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(name, flags, dir_fd=directory)
    except OSError:
        return None
    with open(fd, "rb") as file:  # noqa: PTH123
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != user:
            return None
        try:
            return _parse(file.read(_MAX_NOTE))
        except (ValueError, TypeError, KeyError, RecursionError):
            return None


def _parse(text: bytes) -> MountRecord:
    """Read the text of a note, which for root may be any user's.

    Raises:
        ValueError: It is not JSON.
        TypeError: It is no object, or a field has a wrong type or an impossible value.
        KeyError: A field is missing.
        RecursionError: It is nested too deeply.
    """
    data = json.loads(text)
    # The process may be one of an earlier version, which kept no options.
    lists = {"sources": data["sources"], "options": data.get("options", [])}
    note = MountRecord(**{**data, **{name: tuple(words) for name, words in lists.items()}})
    if not (
        all(type(words) is list for words in lists.values())
        and all(type(word) is str for words in lists.values() for word in words)
        and type(note.mountpoint) is str
        and type(note.failure) in (str, type(None))
        and _is_number(note.pid, 1, _MAX_PID)
        and _is_number(note.started, 0, _MAX_TICKS)
        and _is_number(note.exit_code, 0, _MAX_EXIT_CODE)
    ):
        msg = "expected a note of a mount"
        raise TypeError(msg)
    return note


def _is_number(value: object, least: int, most: int) -> bool:
    """Return whether a value is a whole number, and no truth value, within bounds."""
    return type(value) is int and least <= value <= most
