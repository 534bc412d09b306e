"""The log: one line per message, tracebacks without source lines, and the log daemon's socket."""

from __future__ import annotations

import contextlib
import linecache
import logging
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

import pytest

from qedfuse.mount.process.logs import system_log
from qedfuse.mount.process.logsinks import StderrHandler

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
    """A restarted log daemon is found through the socket's directory, even if a mount hides it."""
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
    """Without a log daemon, as in most containers, messages are dropped silently."""
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
    """Formatting a traceback opens no source file, which could be below the mountpoint."""

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
from qedfuse.mount.process.logs import log_to_stderr, log_uncaught

class Bad:
    def __del__(self):
        raise ValueError("destructor")

def fail():
    raise KeyError("thread")

log_to_stderr()
log_uncaught()
warnings.warn("careful", RuntimeWarning)
Bad()
thread = threading.Thread(target=fail)
thread.start()
thread.join()
"""


def test_an_uncaught_exception_is_logged_in_a_line() -> None:
    """An uncaught exception is logged in one line without source lines."""
    done = subprocess.run(
        [sys.executable, "-c", UNCAUGHT], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.splitlines() == [
        "qedfuse: <string>:14: RuntimeWarning: careful",
        "qedfuse: internal error: exception ignored: ValueError: destructor (<string>:7)",
        "qedfuse: internal error: a thread has ended: KeyError: 'thread' (<string>:10)",
    ]


def fill(writer: int) -> None:
    """Write to a pipe until it takes nothing more."""
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_log_daemon_that_does_not_read_is_skipped(
    tmp_path: Path, kind: socket.SocketKind
) -> None:
    """Messages that the log daemon does not take are counted, and the count is logged later."""
    number = 4000  # more than any queue takes
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        listener.bind(str(tmp_path / "log"))
        if kind == socket.SOCK_STREAM:
            listener.listen()
        handler = system_log(str(tmp_path / "log"))
        stack.callback(handler.close)
        for _ in range(number):
            handler.handle(record())
        if kind == socket.SOCK_STREAM:
            listener, _address = listener.accept()
            stack.enter_context(listener)
        listener.settimeout(0)
        waiting = receive_all(listener)
        assert 0 < waiting.count("it failed") < number
        handler.handle(record())
        dropped, message = receive_all(listener).split("\0")[:2]
        expected = f"{number - waiting.count('it failed')} messages were dropped here"
        assert expected in dropped
        assert message.endswith(": it failed")
        handler.handle(record())
        assert receive_all(listener).count("\0") == 1


def receive_all(listener: socket.socket) -> str:
    """Take all messages that wait."""
    received = []
    with contextlib.suppress(BlockingIOError):
        while True:
            received.append(listener.recv(1 << 20).decode())
    return "".join(received)


def test_a_late_log_daemon_gets_the_number_dropped(tmp_path: Path) -> None:
    """A log daemon that starts later gets the number of messages dropped before."""
    handler = system_log(str(tmp_path / "log"))
    handler.handle(record())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "log"))
        handler.close()
        assert "1 message was dropped here" in receive(listener)


def test_a_pipe_that_another_process_fills_after_the_poll_is_skipped() -> None:
    """Logging does not block if a pipe becomes full between the poll and the write."""
    reader, writer = os.pipe()
    filler = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY | os.O_NONBLOCK)
    handler = StderrHandler(writer)
    poll = handler._poll

    class Filling:
        """Polls, and then fills the pipe."""

        def poll(self, timeout: int) -> object:
            """Return the result from before the pipe was filled."""
            found = poll.poll(timeout)
            fill(filler)
            return found

    handler._poll = cast("Any", Filling())
    try:
        handler.handle(record())  # would wait forever
        handler._poll = poll
        os.read(reader, 1 << 20)
        handler.handle(record())
        report, message = os.read(reader, 1 << 20).decode().splitlines()
        assert report.startswith("1 message was dropped here")
        assert message == "it failed"
    finally:
        handler.close()
        for descriptor in (reader, writer, filler):
            os.close(descriptor)


def test_a_pipe_without_a_reader_is_skipped() -> None:
    """Logging to a full pipe does not block."""
    reader, writer = os.pipe()
    filler = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY | os.O_NONBLOCK)
    handler = StderrHandler(writer)
    try:
        fill(filler)
        handler.handle(record())
        handler.handle(record())
        os.read(reader, 1 << 20)
        handler.handle(record())
        assert os.get_blocking(writer)  # others share it
        report, message = os.read(reader, 1 << 20).decode().splitlines()
        assert report.startswith("2 messages were dropped here")
        assert message == "it failed"
        fill(filler)
        os.close(reader)
        reader = -1
        handler.handle(record())  # a broken pipe
    finally:
        handler.close()
        for descriptor in (reader, writer, filler):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def test_a_terminal_without_a_reader_is_skipped() -> None:
    """Logging to a stopped terminal does not block, also within a line."""
    reader, writer = os.openpty()
    handler = StderrHandler(writer)
    try:
        for _ in range(20_000):
            handler.handle(record())
        assert os.get_blocking(writer)  # the shell shares it
        text = ""
        while "messages were dropped here" not in text:
            text += os.read(reader, 1 << 16).decode()
            handler.handle(record())
    finally:
        handler.close()
        os.close(reader)
        os.close(writer)
