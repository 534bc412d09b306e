"""The entry points of the programs ``qedfuse`` and ``qedimg``.

Each silences Ctrl-C before it loads any other module, so that Ctrl-C during the loading
prints no traceback.
"""

from __future__ import annotations

from qedfuse.cli.sigint import sigint_default


def qedfuse_program() -> int:
    """Run ``qedfuse`` with the arguments of this process; return its exit code."""
    sigint_default()
    from qedfuse.cli.qedfuse.main import main  # noqa: PLC0415  SIGINT must be silenced first

    code = main()
    # During the shutdown of the interpreter no code would catch a KeyboardInterrupt.
    sigint_default()
    return code


def qedimg_program() -> int:
    """Run ``qedimg`` with the arguments of this process; return its exit code."""
    sigint_default()
    from qedfuse.cli.qedimg.main import main  # noqa: PLC0415  SIGINT must be silenced first

    return main()
