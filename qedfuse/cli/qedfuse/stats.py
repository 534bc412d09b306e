"""``qedfuse stats``: print what mounts do, once or every second."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from qedfuse.cli.streams import discard_unwritten, writing_stdout
from qedfuse.errors import HostError, QedError
from qedfuse.mount.commands.statistics import NoStatisticsError, mountpoints_to_ask, read_statistics
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import Console, RenderableType
    from rich.live import Live

_Format: TypeAlias = "Callable[[list[dict[str, Any]]], object]"
"""Formats the documents of mounts; an exception if a document is bad."""

_INTERVAL_SECONDS: Final = 1.0
"""Time between two readings of the statistics with ``--watch``."""
_PLAIN_WIDTH: Final = 200
"""Number of characters in a line of the table if stdout is not a terminal."""


def print_statistics(path: str | None, output: str, report: Callable[[QedError], None]) -> int:
    """Print the statistics of one mount or of all mounts; return the exit code.

    Args:
        path: The mountpoint; None for all mounts of this user, or of all users if root asks.
        output: ``human``, ``json`` or ``prometheus``.
        report: Called with the error of each mount whose statistics cannot be read or shown, if
            there are several mounts.  The exit code is that of the last such error, or 0.

    Raises:
        QedError: The statistics of ``path``, or of the only mount, cannot be read or shown, or
            there is no mount.
        BrokenPipeError: The reader of stdout has gone.
        HostError: stdout cannot be written to.
    """
    format_all: Callable[[list[dict[str, Any]]], str] = partial(_json, indent=4)
    if output == "prometheus":
        from qedfuse.mount.statistics.prometheus import exposition  # noqa: PLC0415  only if needed

        format_all = exposition
    elif output == "human":
        from qedfuse.cli.qedfuse.statstext import mount_text  # noqa: PLC0415  only if needed

        def format_all(documents: list[dict[str, Any]]) -> str:
            return "".join(map(mount_text, documents))

    documents, code = _read_all(path, report, format_all)
    _print(format_all(documents))
    return code


def watch_statistics(path: str | None, output: str, report: Callable[[QedError], None]) -> int:
    """Print statistics every second until an exception ends the loop.

    The arguments and the errors are those of `print_statistics`, but ``prometheus`` is not
    permitted.  If the last mount ends, a `QedError` is raised.
    """
    if output == "json":
        for documents in _every_second(path, report, _json):
            _print(_json(documents))
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
        for documents in _every_second(path, report, partial(_table, before)):
            table = _table(before, documents)
            before.clear()
            before.update((document["mountpoint"], document) for document in documents)
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


def _json(documents: list[dict[str, Any]], indent: int | None = None) -> str:
    """Return the JSON document that has ``documents`` as its mounts, and a line end."""
    return f"{json.dumps({'version': 1, 'mounts': documents}, indent=indent)}\n"


def _print(text: str) -> None:
    """Print text to stdout immediately; the errors are those of `writing_stdout`."""
    with writing_stdout():
        sys.stdout.write(text)
        sys.stdout.flush()


def _check(document: dict[str, Any], mountpoint: str, format_all: _Format) -> None:
    """Raise NoStatisticsError if the document of a mount cannot be formatted.

    Documents are not trusted: they can come from another version or, for root, from another user.
    """
    shown = printable(mountpoint)
    try:
        format_all([document])
    except KeyError as error:
        msg = (
            f"{shown}: statistics: found no field {printable(str(error.args[0]))}, expected one "
            "(the mount runs another version of qedfuse; --output json prints what there is)"
        )
        raise NoStatisticsError(msg) from error
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        msg = (
            f"{shown}: statistics: found an impossible value in a field, expected one of this "
            "version (--output json prints what there is)"
        )
        raise NoStatisticsError(msg) from error
    except RecursionError as error:
        msg = f"{shown}: statistics: found deeply nested values, expected those of this version"
        raise NoStatisticsError(msg) from error


def _every_second(
    path: str | None, report: Callable[[QedError], None], format_all: _Format
) -> Iterator[list[dict[str, Any]]]:
    """Yield the documents of `_read_all` every second; the errors are those of `_read_all`."""
    due = time.monotonic()
    while True:
        yield _read_all(path, report, format_all)[0]
        due = max(due + _INTERVAL_SECONDS, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


def _read_all(
    path: str | None, report: Callable[[QedError], None], format_all: _Format
) -> tuple[list[dict[str, Any]], int]:
    """Return the statistics of one mount or of all mounts, and the last reported error's exit code.

    Each document is one that ``format_all`` can format.  The error of ``path``, or of the only
    mount, is raised; other errors are reported.
    """
    documents, code = [], 0
    found: Sequence[str] = mountpoints_to_ask(path)
    for mountpoint in found:
        try:
            document = read_statistics(mountpoint)
            _check(document, mountpoint, format_all)
            documents.append(document)
        except QedError as error:
            if path is not None or len(found) == 1:
                raise
            report(error)
            code = error.exit_code
    return documents, code
