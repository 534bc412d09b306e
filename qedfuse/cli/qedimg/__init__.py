"""The command ``qedimg``: one module for each of its subcommands, and what they share."""

from __future__ import annotations

from qedfuse.cli.starting import end_quietly


def program() -> int:
    """Run the program that the user started; give its exit code."""
    end_quietly()
    from qedfuse.cli.qedimg.main import main  # noqa: PLC0415  the above has to be first

    return main()
