"""What the commands do before anything else, so that Ctrl-C is never answered by a traceback.

Nothing is imported here that has to be read from a file first: not even the module signal,
which makes enumerations of what its kernel ``_signal`` has.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]


def sigint_default() -> None:
    """Have Ctrl-C end the process without a word, as long as modules are loaded.

    What is ignored from the start stays so.  What Python itself does before it comes to
    our first line, some hundredths of a second, nobody can change.
    """
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def interruptible() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again, for who is ready to catch it."""
    if _signal.getsignal(_signal.SIGINT) == _signal.SIG_DFL:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)


def mount_program() -> int:
    """Run ``qedfuse`` as the program that the user started; give its exit code."""
    sigint_default()
    from qedfuse.cli.qedfuse import main  # noqa: PLC0415  the above has to be first

    code = main()
    # What is left is Python's own end.
    sigint_default()
    return code
