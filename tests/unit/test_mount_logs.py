"""The log: one line a message, tracebacks without source lines, and the log daemon's socket."""

from __future__ import annotations

import linecache
import logging
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Final, NoReturn

import pytest

from qedfuse.mount.logs import system_log

if TYPE_CHECKING:
    from pathlib import Path


def record(error: BaseException | None = None) -> logging.LogRecord:
    """Make a record, with an exception or without."""
    information = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("qedfuse", logging.ERROR, __file__, 1, "it failed", (), information)


def receive(listener: socket.socket) -> str:
    """Take a message."""
    return listener.recv(65536).decode().rstrip("\0")


def test_the_log_daemon_is_found_whatever_hides_its_socket(tmp_path: Path) -> None:
    """Also after it was started anew: the directory of the socket is looked up once."""
    place = tmp_path / "run"
    place.mkdir()
    link = tmp_path / "log"
    link.symlink_to(place / "dev-log")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(place / "dev-log"))
        handler = system_log(str(link))
        place.rename(tmp_path / "moved")
        handler.handle(record())
        assert receive(listener).endswith(": it failed")
    (tmp_path / "moved" / "dev-log").unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "moved" / "dev-log"))
        handler.handle(record())
        assert receive(listener).endswith(": it failed")
    handler.close()


def test_without_a_log_daemon_nothing_happens(tmp_path: Path) -> None:
    """As in most containers."""
    system_log(str(tmp_path / "none")).handle(record())
    system_log(str(tmp_path / "none" / "none")).handle(record())


def fail() -> None:
    """Raise a group that has a cause."""
    try:
        _ = 1 // 0
    except ZeroDivisionError as error:
        msg = "both"
        raise ExceptionGroup(msg, [ValueError("near")]) from error


def test_tracebacks_read_no_source_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files may lie under the mountpoint of the process that would read them."""

    def refuse(*_args: object, **_kwargs: object) -> NoReturn:
        pytest.fail("a source file is read")

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "log"))
        handler = system_log(str(tmp_path / "log"))
        with pytest.raises(ExceptionGroup) as caught:
            fail()
        linecache.clearcache()
        for name in ("updatecache", "getlines"):
            monkeypatch.setattr(linecache, name, refuse)
        handler.handle(record(caught.value))
        text = receive(listener)
        handler.close()
    assert f'File "{__file__}", line ' in text
    assert "in fail" in text
    assert "ZeroDivisionError: " in text
    assert "ValueError: near" in text
    assert "raise " not in text


UNCAUGHT: Final = """
import threading, warnings
from qedfuse.mount.logs import log_to_stderr, log_what_nobody_catches

class Bad:
    def __del__(self):
        raise ValueError("destructor")

def fail():
    raise KeyError("thread")

log_to_stderr()
log_what_nobody_catches()
warnings.warn("careful", RuntimeWarning)
Bad()
thread = threading.Thread(target=fail)
thread.start()
thread.join()
"""


def test_what_nobody_catches_is_logged_in_a_line() -> None:
    """Python itself would show source lines."""
    done = subprocess.run(
        [sys.executable, "-c", UNCAUGHT], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.splitlines() == [
        "qedfuse: <string>:14: RuntimeWarning: careful",
        "qedfuse: internal error: exception ignored: ValueError: destructor (<string>:7)",
        "qedfuse: internal error: a thread has ended: KeyError: 'thread' (<string>:10)",
    ]
