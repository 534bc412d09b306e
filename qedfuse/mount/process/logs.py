"""Configuration of the log: stderr in the foreground, the system log in the background."""

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

    The source files may lie under the mountpoint of the process itself, and reading them would
    wait for a reply of its own.
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
    """Prevent the traceback module from reading source files, for all exceptions of a chain."""
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
    """Formats each message as one line, with a traceback after it only when debugging."""

    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__("qedfuse: %(message)s")
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        if not self._tracebacks and record.exc_info and record.exc_info[1] is not None:
            # Users and other programs read stderr line by line.
            error = record.exc_info[1]
            where = _origin(error)
            return (
                f"qedfuse: {printable(record.getMessage())}: "
                f"{type(error).__name__}: {printable(str(error))}{where}"
            )
        return super().format(record)


def _origin(error: BaseException) -> str:
    """Return the file and the line in which an exception was raised, in parentheses."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"  # noqa: PTH119


def log_to_stderr(*, debug: bool = False) -> None:
    """Log to stderr; with ``debug``, also every request and tracebacks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(tracebacks=debug))
    log_to(handler)
    logging.getLogger("qedfuse").setLevel(logging.DEBUG if debug else logging.INFO)


def log_to_stderr_without_waiting() -> None:
    """Log to stderr without waiting for its reader; messages that would wait are dropped.

    For the time in which disks are served: a reader that is stopped must not stop them.
    """
    handler = StderrHandler(sys.stderr.fileno())
    handler.setFormatter(_LineFormatter(tracebacks=False))
    log_to(handler)


def system_log(path: str = _SYSLOG) -> logging.Handler:
    """Return a handler for the system log; without a log daemon, one that drops everything.

    The directory of the socket is opened once, because its path may lead through the mount
    later.  A log daemon that is restarted is found in the same directory.

    Args:
        path: The socket of the log daemon (syslog(3)).
    """
    try:
        directory, name = os.path.split(os.path.realpath(path))
        handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # no log daemon, as in most containers
        return logging.NullHandler()
    handler = SystemLogHandler(f"/proc/self/fd/{handle}/{name}")
    # With tracebacks, which the terminal does not show.
    handler.setFormatter(_TracebackFormatter("%(message)s"))
    return handler


def log_uncaught() -> None:
    """Log Python's warnings, and exceptions that no code can catch, with one line each.

    Python's own handlers would read the source file for them, as for tracebacks.
    """
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_thread_end
    warnings.showwarning = _log_warning


def _log_unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Log an exception that cannot be raised, such as one in a finalizer."""
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
    """Replace all handlers of the root logger by one."""
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    # A full disk or a closed pipe behind stderr must not produce tracebacks about logging.
    logging.raiseExceptions = False
