"""``qedimg map``: list data, zeros and holes of a disk, and where they are stored."""

from __future__ import annotations

import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.errors import CorruptImageError
from qedfuse.text import printable
from qedfuse.tools.inspection.fastmap import open_fast_map

if TYPE_CHECKING:
    import argparse

    from qedfuse.util.backgroundtasks import Progress

EXAMPLE: Final = "qedimg map --output json --start-offset 1G --max-length 64M vm.qed"
DESCRIPTION: Final = """\
List the extents of a disk, those of its bases included: which ranges are data, zeros or
holes, and where in which file they are stored.  The text lists only data; the JSON lists
everything, with qemu-img's keys.

If a table entry points nowhere, the content of its range is unknown: it is "present"
without "zero" and "data", and the exit code is 13."""

HEADS: Final = {"human": f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n", "json": "["}
"""The beginning of the output, by its format."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "-f", dest="format", choices=("qed", "raw"), help="do not detect the format"
    )
    parser.add_argument(
        "--start-offset",
        "-s",
        metavar="OFFSET",
        type=common.size,
        default=0,
        help="begin at this offset of the disk (0)",
    )
    parser.add_argument(
        "--max-length", "-l", metavar="SIZE", type=common.size, help="list this much of the disk"
    )
    common.add_output(parser)
    common.add_share(parser)
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """List the extents; return the exit code."""
    # On a terminal the list itself shows the progress.
    with progress(arguments, "Mapping", bar=not sys.stdout.isatty()) as on_progress:
        listed = _list_fast(arguments, on_progress)
        if not listed.complete:
            run_async(_list_rest, arguments, listed, on_progress)
    return 0


class _Listed(NamedTuple):
    """How much of the list has been printed.

    Attributes:
        head: Whether its beginning has been printed.
        extents: Whether any extent has been printed.
        end: The offset of the disk up to which extents have been printed.
        complete: Whether the list is finished.
    """

    head: bool
    extents: bool
    end: int
    complete: bool = False


def _list_fast(arguments: argparse.Namespace, on_progress: Progress) -> _Listed:
    """Print as many extents as the C extension can list; return how many that are."""
    nothing = _Listed(head=False, extents=False, end=arguments.start_offset)
    part = arguments.start_offset or arguments.max_length is not None
    if part or arguments.format == "raw" or _is_silent(arguments):
        return nothing
    as_json = arguments.output == "json"
    with open_fast_map(arguments.image, share=arguments.force_share) as found:
        if found is None:
            return nothing
        sys.stdout.write(HEADS[arguments.output])
        written = False
        for text in found.lines(as_json=as_json, name=printable(arguments.image)):
            # Each line of JSON begins with a comma, the first one included.
            sys.stdout.write(text if written or not as_json else text.removeprefix(",\n"))
            written = written or bool(text)
            on_progress(found.reached, found.size)
        if found.reached < found.size:
            return _Listed(head=True, extents=written, end=found.reached)
    if as_json:
        sys.stdout.write("]\n")
    return _Listed(head=True, extents=True, end=found.size, complete=True)


def _is_silent(arguments: argparse.Namespace) -> bool:
    """Return whether ``-q`` suppresses the list; it does not suppress JSON."""
    return bool(arguments.quiet) and arguments.output == "human"


async def _list_rest(arguments: argparse.Namespace, listed: _Listed, on_progress: Progress) -> None:
    """Print the extents after those in ``listed``.

    Raises:
        CorruptImageError: There were bad table entries; all extents have been printed.
    """
    from qedfuse.cli.qedimg.maptext import make_writer  # noqa: PLC0415  imported late: the fast map must not load it
    from qedfuse.tools.inspection.mapping import open_map  # noqa: PLC0415

    options = common.open_options(arguments)
    async with open_map(arguments.image, arguments.format or "auto", options) as found:
        names = [printable(path) for path in found.files]
        text = make_writer(arguments.output, names, continued=listed.extents)
        write = (lambda _text: 0) if _is_silent(arguments) else sys.stdout.write
        if not listed.head:
            write(HEADS[arguments.output])
        bad, start = 0, listed.end
        end = found.size
        if arguments.max_length is not None:
            end = min(end, start + arguments.max_length)
        async with aclosing(found.batches(listed.end, arguments.max_length)) as batches:
            async for batch in batches:
                write(text.body(batch))
                bad += batch.count_bad()
                on_progress(int(batch.starts[-1] + batch.lengths[-1]) - start, end - start)
        write(text.tail(arguments.start_offset))
    if bad:
        msg = (
            f"{printable(arguments.image)}: tables: found {bad} extents whose entries point "
            "nowhere, expected offsets inside the file (see: qedimg check)"
        )
        raise CorruptImageError(msg)
