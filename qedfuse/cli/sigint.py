"""What Ctrl-C does while a command starts and ends: end the process without a traceback.

Only ``_signal``, which is built into the interpreter, is imported: a module that is read
from a file would open a window in which Ctrl-C still prints a traceback.  ``signal`` itself
is such a file, and builds enumerations of what ``_signal`` has.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]


def sigint_default() -> None:
    """Make Ctrl-C end the process silently, in place of Python's KeyboardInterrupt.

    For the time in which modules are loaded, and after the work is done.  A SIGINT that
    was ignored from the start (as under nohup) stays ignored.  The interpreter's own start,
    some hundredths of a second before the first line of a program, cannot be covered.
    """
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def sigint_raises() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again; the caller must be ready to catch it."""
    if _signal.getsignal(_signal.SIGINT) == _signal.SIG_DFL:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
