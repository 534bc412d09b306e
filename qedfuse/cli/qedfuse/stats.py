"""``qedfuse stats``: print what mounts do, once or every second."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qedfuse.cli.streams import discard_unwritten, writing_stdout
from qedfuse.errors import HostError, QedError
from qedfuse.mount.commands.statistics import NoStatisticsError, mountpoints_to_ask, read_statistics
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import Console, RenderableType
    from rich.live import Live


T = TypeVar("T")

_INTERVAL_SECONDS: Final = 1.0
"""Time between two readings of the statistics with ``--watch``."""
_PLAIN_WIDTH: Final = 200
"""Number of characters in a line of the table if stdout is not a terminal."""


def print_statistics(path: str | None, output: str, report: Callable[[QedError], None]) -> int:
    """Print the statistics of one mount or of all mounts; return the exit code.

    Args:
        path: The mountpoint; None for all mounts of this user, or of all users if root asks.
        output: ``human``, ``json`` or ``prometheus``.
        report: Called with the error of each mount whose statistics cannot be read, if there are
            several mounts.  The exit code is that of the last such error, or 0.

    Raises:
        QedError: The statistics of ``path``, or of the only mount, cannot be read, or there is no
            mount.
        BrokenPipeError: The reader of stdout has gone.
        HostError: stdout cannot be written to.
    """
    documents, code = _read_all(path, report)
    if output == "prometheus":
        from qedfuse.mount.statistics.prometheus import exposition  # noqa: PLC0415  only if needed

        text = _formatted(lambda: exposition(documents))
    elif output == "json":
        text = f"{json.dumps({'version': 1, 'mounts': documents}, indent=4)}\n"
    else:
        from qedfuse.cli.qedfuse.statstext import mount_text  # noqa: PLC0415  only if needed

        text = _formatted(lambda: "".join(map(mount_text, documents)))
    _print(text)
    return code


def watch_statistics(path: str | None, output: str, report: Callable[[QedError], None]) -> int:
    """Print statistics every second until an exception ends the loop.

    The arguments and the errors are those of `print_statistics`, but ``prometheus`` is not
    permitted.  If the last mount ends, a `QedError` is raised.
    """
    if output == "json":
        for documents, _code in _every_second(path, report):
            _print(f"{json.dumps({'version': 1, 'mounts': documents})}\n")
    else:
        _watch_table(path, report)
    return 0


def _watch_table(path: str | None, report: Callable[[QedError], None]) -> None:
    """Show a table every second; on a terminal it replaces the previous one."""
    # rich is slow to load.
    from qedfuse.cli.qedfuse.statstable import StdoutConsole  # noqa: PLC0415

    console = StdoutConsole(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    before: dict[str, Mapping[str, Any]] = {}
    with _live(console) as live:
        for documents, _code in _every_second(path, report):
            table = _formatted(partial(_table, before, documents))
            before = {document["mountpoint"]: document for document in documents}
            with writing_stdout():
                if console.is_terminal:
                    live.update(table, refresh=True)
                else:
                    console.print(table)
                    sys.stdout.flush()


@contextmanager
def _live(console: Console) -> Iterator[Live]:
    """Show a live display until the block ends; the block must change it in `writing_stdout`."""
    from rich.live import Live  # noqa: PLC0415  slow to load

    # `auto_refresh` would start a thread, and `read_statistics` forks, which is not safe in a
    # process with several threads.  `redirect_stderr` shows the text for stderr above the display.
    live = Live(
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=sys.stderr.isatty(),
    )
    # The beginning and the end of the display hide and show the cursor.
    with writing_stdout():
        live.start()
    try:
        yield live
    except BaseException:
        # Show the cursor again.  A failure is ignored, so that after Ctrl-C the exit code is always
        # that of Ctrl-C.
        try:
            with writing_stdout():
                live.stop()
        except BrokenPipeError:
            discard_unwritten(sys.stdout)
        except HostError:
            pass
        raise
    with writing_stdout():
        live.stop()


def _table(
    before: Mapping[str, Mapping[str, Any]], documents: list[dict[str, Any]]
) -> RenderableType:
    """Return a table of ``documents``; ``before`` has the previous document of each mountpoint."""
    from qedfuse.cli.qedfuse.intervals import intervals  # noqa: PLC0415  rarely needed
    from qedfuse.cli.qedfuse.statstable import render  # noqa: PLC0415  needs rich

    return render(
        (document, intervals(before.get(document["mountpoint"]), document))
        for document in documents
    )


def _print(text: str) -> None:
    """Print text to stdout immediately; the errors are those of `writing_stdout`."""
    with writing_stdout():
        sys.stdout.write(text)
        sys.stdout.flush()


def _formatted(format_documents: Callable[[], T]) -> T:
    """Return the result of ``format_documents``; raise NoStatisticsError for a bad document.

    Documents are not trusted: they can come from another version or, for root, from another user.
    """
    try:
        return format_documents()
    except KeyError as error:
        msg = (
            f"statistics: found no field {printable(str(error.args[0]))}, expected one (the mount "
            "runs another version of qedfuse; --output json prints what there is)"
        )
        raise NoStatisticsError(msg) from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        msg = (
            "statistics: found an impossible value in a field, expected those of this version "
            "(--output json prints what there is)"
        )
        raise NoStatisticsError(msg) from error


def _every_second(
    path: str | None, report: Callable[[QedError], None]
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Yield the result of `_read_all` every second; the errors are those of `_read_all`."""
    due = time.monotonic()
    while True:
        yield _read_all(path, report)
        due = max(due + _INTERVAL_SECONDS, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


def _read_all(
    path: str | None, report: Callable[[QedError], None]
) -> tuple[list[dict[str, Any]], int]:
    """Return the statistics of one mount or of all mounts, and the last reported error's exit code.

    The error of ``path``, or of the only mount, is raised; other errors are reported.
    """
    documents, code = [], 0
    found: Sequence[str] = mountpoints_to_ask(path)
    for mountpoint in found:
        try:
            documents.append(read_statistics(mountpoint))
        except QedError as error:
            if path is not None or len(found) == 1:
                raise
            report(error)
            code = error.exit_code
    return documents, code
