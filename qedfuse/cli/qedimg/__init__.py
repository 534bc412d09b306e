"""The command ``qedimg``: one module for each of its subcommands, and what they share."""

from __future__ import annotations

from qedfuse.cli.starting import sigint_default


def program() -> int:
    """Run the program that the user started; give its exit code."""
    sigint_default()
    from qedfuse.cli.qedimg.main import main  # noqa: PLC0415  the above has to be first

    return main()
