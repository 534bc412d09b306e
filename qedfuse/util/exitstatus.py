"""How a process has ended, in words."""

from __future__ import annotations

import signal


def describe_exit(code: int) -> str:
    """Return how a process has ended, such as ``ended by SIGKILL``, from its exit code.

    Args:
        code: The exit code; for a process that a signal has ended, the negative number of the
            signal, as in `subprocess` and `os.waitstatus_to_exitcode`.
    """
    return f"ended by {signal_name(-code)}" if code < 0 else f"ended with status {code}"


def signal_name(number: int) -> str:
    """Return the name of a signal, or ``signal N`` if it has no name, as most real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
