"""The dispositions of signals while a command starts and ends (signal(7)).

This module imports ``_signal`` and ``posix``, which are built into the interpreter.  The module
``signal`` would be read from a file, and Ctrl-C while it is read would print a traceback.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import posix


def sigint_default() -> None:
    """Make Ctrl-C end the process silently instead of raising KeyboardInterrupt.

    A program must call this function before it loads modules.  It can call the function again when
    its work is done.  If SIGINT is ignored, as in a background job of a shell script, or has a
    handler of the program, nothing changes.
    """
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def sigint_raises() -> None:
    """Make Ctrl-C raise KeyboardInterrupt again; the caller must be ready to catch it.

    If SIGINT is ignored or has a handler of the program, nothing changes.
    """
    if _signal.getsignal(_signal.SIGINT) == _signal.SIG_DFL:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)


def report_sigterm(program: str) -> None:
    """Let SIGTERM print a line with the name of the program before it ends the process.

    If SIGTERM is ignored or has a handler already, nothing changes.  A handler that the program
    sets later replaces this one.
    """

    def end(number: int, _frame: object) -> None:
        _signal.signal(number, _signal.SIG_DFL)
        try:  # noqa: SIM105  contextlib would be read from a file
            posix.write(2, f"{program}: ended by SIGTERM\n".encode())
        except OSError:
            pass  # stderr is closed
        posix.kill(posix.getpid(), number)

    if _signal.getsignal(_signal.SIGTERM) == _signal.SIG_DFL:
        _signal.signal(_signal.SIGTERM, end)


def report_children() -> None:
    """Let the kernel keep the exit codes of child processes for waitpid(2).

    A caller that ignores SIGCHLD would otherwise leave that to this program, which then could not
    learn how a child has ended.
    """
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)


def ignore_diagnostic_signals() -> None:
    """Ignore SIGUSR1 and SIGUSR2, whose default action is to end the process.

    The server of a mount logs statistics after these signals, but only while it serves
    (`qedfuse.mount.statistics.diagnostics`).  A user cannot know exactly when it serves,
    so the signals must not do harm before or afterwards.
    """
    for number in (_signal.SIGUSR1, _signal.SIGUSR2):
        _signal.signal(number, _signal.SIG_IGN)
