"""Where messages go: stderr in front, the system's log in the background."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from typing import Final

from qedfuse.util.text import printable

_SYSLOG: Final = "/dev/log"


class _LineFormatter(logging.Formatter):
    """Gives each message one line; only a traceback, which is for us, may follow."""

    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__("qedfuse: %(message)s")
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        if not self._tracebacks and record.exc_info and record.exc_info[1] is not None:
            # The log of the system is read line by line, and so is stderr by users.
            error = record.exc_info[1]
            where = _origin(error)
            return (
                f"qedfuse: {printable(record.getMessage())}: "
                f"{type(error).__name__}: {printable(str(error))}{where}"
            )
        return super().format(record)


def _origin(error: BaseException) -> str:
    """Name the file and the line that an exception came from."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"  # noqa: PTH119


def log_to_stderr(*, debug: bool = False) -> None:
    """Show messages on stderr; with ``debug``, every request and tracebacks too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(tracebacks=debug))
    _install(handler)
    logging.getLogger("qedfuse").setLevel(logging.DEBUG if debug else logging.INFO)


def log_to_syslog() -> None:
    """Send messages to the system's log from now on; nowhere where there is none."""
    handler: logging.Handler
    try:
        handler = logging.handlers.SysLogHandler(
            _SYSLOG, facility=logging.handlers.SysLogHandler.LOG_DAEMON
        )
        handler.ident = f"qedfuse[{os.getpid()}]: "
        # With tracebacks: the log is the place for them.
        handler.setFormatter(logging.Formatter("%(message)s"))
    except OSError:  # no log daemon, as in most containers
        handler = logging.NullHandler()
    _install(handler)


def _install(handler: logging.Handler) -> None:
    """Make a handler the only one."""
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    # A full disk or a closed pipe behind stderr must not produce tracebacks about logging.
    logging.raiseExceptions = False
