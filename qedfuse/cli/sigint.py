"""Ctrl-C while a command starts and ends: the process ends without a traceback.

This module imports only ``_signal``, which is built into the interpreter.  While a module is
read from a file, Ctrl-C would still print a traceback, and ``signal`` is such a module.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]


def sigint_default() -> None:
    """Make Ctrl-C end the process silently instead of raising KeyboardInterrupt.

    A program calls this function before it loads modules and after its work is done.  If
    SIGINT is ignored (as under nohup) or has a handler of its own, nothing changes.  During
    the start of the interpreter, some hundredths of a second, Ctrl-C still prints a
    traceback.
    """
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def sigint_raises() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again; the caller must be ready to catch it.

    If SIGINT is ignored or has a handler of its own, nothing changes.
    """
    if _signal.getsignal(_signal.SIGINT) == _signal.SIG_DFL:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
