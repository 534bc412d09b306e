"""The command ``qedimg``: one module for each of its subcommands, and what they share."""

from __future__ import annotations

import signal


def program() -> int:
    """Run the program that the user started; give its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C while modules are loaded ends it without a word, not with a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qedfuse.cli.qedimg.main import main  # noqa: PLC0415  the above has to be first

    return main()
