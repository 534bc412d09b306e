"""Configuring the log: to stderr in the foreground, to the system log in the background."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
import warnings
from typing import Final, TextIO

from qedfuse.mount.process.logsinks import StderrHandler, SystemLogHandler
from qedfuse.text import printable

_log = logging.getLogger(__name__)

_SYSLOG: Final = "/dev/log"


class _TracebackFormatter(logging.Formatter):
    """Formats tracebacks without the text of the source lines.

    The source files may be below the mountpoint that this process serves.  If it read them, it
    would wait forever for its own reply.
    """

    def formatException(self, ei: logging._SysExcInfoType) -> str:  # noqa: N802  logging's name
        """Format an exception with the file, line and function of each frame."""
        if ei[1] is None:
            return super().formatException(ei)
        exception = traceback.TracebackException.from_exception(
            ei[1], lookup_lines=False, compact=True
        )
        _remove_source_lines(exception, set())
        return "".join(exception.format()).rstrip("\n")


def _remove_source_lines(exception: traceback.TracebackException, seen: set[int]) -> None:
    """Remove the source lines of an exception and of its causes, contexts and group members.

    ``seen`` has the ``id`` of each exception that has been changed, because a chain may have a
    cycle.
    """
    if id(exception) in seen:
        return
    seen.add(id(exception))
    exception.stack = traceback.StackSummary.from_list(
        [(frame.filename, frame.lineno or 0, frame.name, "") for frame in exception.stack]
    )
    related = (exception.__cause__, exception.__context__, *(exception.exceptions or ()))
    for other in related:
        if other is not None:
            _remove_source_lines(other, seen)


class _LineFormatter(_TracebackFormatter):
    """Formats messages; a traceback follows only if ``tracebacks`` is set.

    Without tracebacks, a message with an exception is one line.
    """

    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__("qedfuse: %(message)s")
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        if not self._tracebacks and record.exc_info and record.exc_info[1] is not None:
            # No traceback follows, because users and other programs read stderr line by line.
            error = record.exc_info[1]
            where = _origin(error)
            return (
                f"qedfuse: {printable(record.getMessage())}: "
                f"{type(error).__name__}: {printable(str(error))}{where}"
            )
        return super().format(record)


def _origin(error: BaseException) -> str:
    """Return the place where an exception was raised, as `` (FILE:LINE)``; empty if unknown."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"  # noqa: PTH119


def log_to_stderr(*, debug: bool = False) -> None:
    """Log to stderr; with ``debug``, also log every request, and tracebacks of exceptions."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(tracebacks=debug))
    log_to(handler)
    logging.getLogger("qedfuse").setLevel(logging.DEBUG if debug else logging.INFO)


def log_to_stderr_without_waiting() -> None:
    """Log to stderr from now on without waiting for the reader of stderr.

    A message is dropped if its write would have to wait.  Without ``-d``, a server that logs to
    stderr must call this function before it serves disks, because a stopped reader must not stop
    the disks.
    """
    handler = StderrHandler(sys.stderr.fileno())
    handler.setFormatter(_LineFormatter(tracebacks=False))
    log_to(handler)


def system_log(path: str = _SYSLOG) -> logging.Handler:
    """Return a handler for the system log; it drops messages while no log daemon listens.

    The directory of the socket is opened now and stays open, because its path may lead through the
    mount later.  If it cannot be opened now, the handler drops all messages.

    Args:
        path: The socket of the log daemon (syslog(3)).
    """
    try:
        directory, name = os.path.split(os.path.realpath(path))
        handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # for example, /dev/log is a link into a directory that is missing
        return logging.NullHandler()
    handler = SystemLogHandler(handle, name)
    # The system log always gets tracebacks; stderr gets them only with ``-d``.
    handler.setFormatter(_TracebackFormatter("%(message)s"))
    return handler


def log_uncaught() -> None:
    """Log Python's warnings, and exceptions that no code can catch.

    Python's own hooks would read source files, which may be below the mountpoint.
    """
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_thread_end
    warnings.showwarning = _log_warning


def _log_unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Log an exception that cannot be raised, such as an exception in a finalizer."""
    _log.error("internal error: %s", lost.err_msg or "exception ignored", exc_info=lost.exc_value)


def _log_thread_end(lost: threading.ExceptHookArgs) -> None:
    """Log an exception that has ended a thread."""
    _log.error("internal error: a thread has ended", exc_info=lost.exc_value)


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001  the signature of warnings.showwarning
    line: str | None = None,  # noqa: ARG001
) -> None:
    """Log a warning of the module ``warnings``."""
    _log.warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)


def log_to(handler: logging.Handler) -> None:
    """Make ``handler`` the only handler of the root logger, and close all earlier handlers."""
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    # If a handler cannot write a message, for example to a full disk, it would by default print a
    # traceback with source lines, and the source files may be below the mountpoint.
    logging.raiseExceptions = False
