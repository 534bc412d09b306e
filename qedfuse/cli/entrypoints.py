"""The entry points of the programs ``qedfuse`` and ``qedimg``.

While modules are loaded, Ctrl-C ends the process without a traceback, and the collector of
reference cycles runs rarely.  A server or a subcommand of ``qedimg`` can run for long, so after
loading its modules it lets the collector run as often as by default.
"""

from __future__ import annotations

from qedfuse.cli.dispositions import (
    ignore_diagnostic_signals,
    report_children,
    report_sigterm,
    sigint_default,
)


def qedfuse_program() -> int:
    """Run ``qedfuse`` with the arguments of this process; return its exit code."""
    ignore_diagnostic_signals()
    _prepare_to_load("qedfuse")
    from qedfuse.cli.qedfuse.main import main  # noqa: PLC0415  only after sigint_default()

    code = main()
    # While the interpreter shuts down, no code would catch a KeyboardInterrupt.
    sigint_default()
    return code


def qedimg_program() -> int:
    """Run ``qedimg`` with the arguments of this process; return its exit code."""
    _prepare_to_load("qedimg")
    from qedfuse.cli.qedimg.main import main  # noqa: PLC0415  only after sigint_default()

    return main()  # `main` ignores SIGINT before it returns


def _prepare_to_load(program: str) -> None:
    """Let signals end the process while modules load; let the cycle collector run rarely."""
    sigint_default()
    report_children()
    report_sigterm(program)
    from qedfuse.util.garbagecollector import collect_rarely  # noqa: PLC0415  after sigint_default()

    collect_rarely()
