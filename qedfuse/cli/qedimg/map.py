"""``qedimg map``: where everything on a disk lies."""

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
    from collections.abc import Callable

EXAMPLE: Final = "qedimg map --output json --start-offset 1G --max-length 64M vm.qed"
DESCRIPTION: Final = """\
List the extents of a disk, those of its bases included: what is data, zeros or a hole, and
where in which file it lies.  The table for people has the data only; the JSON has
everything, with qemu-img's keys.

Where a table entry points nowhere, nobody can tell what is there: "present" without
"zero" and "data", and exit code 13 in the end."""

HEADS: Final = {"human": f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n", "json": "["}
"""What each kind of list begins with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("-f", dest="format", choices=("qed", "raw"), help="do not guess the format")
    parser.add_argument(
        "--start-offset",
        "-s",
        metavar="OFFSET",
        type=common.size,
        default=0,
        help="begin here, not at the disk's beginning",
    )
    parser.add_argument(
        "--max-length", "-l", metavar="SIZE", type=common.size, help="how much of the disk to list"
    )
    common.add_output(parser)
    common.add_share(parser)
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """List the extents."""
    # On a terminal the list itself shows that something is going on.
    with progress(arguments, "Mapping", bar=not sys.stdout.isatty()) as report:
        listed = _list_quickly(arguments, report)
        if not listed.all:
            run_async(_list_rest, arguments, listed, report)
    return 0


class _Listed(NamedTuple):
    """What has been listed: whether the head, whether any extent, up to where, whether all."""

    begun: bool
    any: bool
    end: int
    all: bool = False


def _list_quickly(arguments: argparse.Namespace, report: Callable[[int, int], None]) -> _Listed:
    """List what can be listed without loading much."""
    nothing = _Listed(begun=False, any=False, end=arguments.start_offset)
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
            # In JSON a comma is in front of each line, also of the first.
            sys.stdout.write(text if written or not as_json else text.removeprefix(",\n"))
            written = written or bool(text)
            report(found.reached, found.size)
        if found.reached < found.size:
            return _Listed(begun=True, any=written, end=found.reached)
    if as_json:
        sys.stdout.write("]\n")
    return _Listed(begun=True, any=True, end=found.size, all=True)


def _is_silent(arguments: argparse.Namespace) -> bool:
    """Tell whether nothing is to be printed; JSON is always wanted."""
    return bool(arguments.quiet) and arguments.output == "human"


async def _list_rest(
    arguments: argparse.Namespace, listed: _Listed, report: Callable[[int, int], None]
) -> None:
    """List what has not been listed yet."""
    from qedfuse.cli.qedimg.maptext import make_writer  # noqa: PLC0415  a quick start
    from qedfuse.tools.inspection.mapping import open_map  # noqa: PLC0415

    options = common.open_options(arguments)
    async with open_map(arguments.image, arguments.format or "auto", options) as found:
        names = [printable(path) for path in found.files]
        text = make_writer(arguments.output, names, goes_on=listed.any)
        write = (lambda _text: 0) if _is_silent(arguments) else sys.stdout.write
        if not listed.begun:
            write(HEADS[arguments.output])
        bad, start = 0, listed.end
        end = found.size
        if arguments.max_length is not None:
            end = min(end, start + arguments.max_length)
        async with aclosing(found.batches(listed.end, arguments.max_length)) as batches:
            async for batch in batches:
                write(text.body(batch))
                bad += batch.count_bad()
                report(int(batch.starts[-1] + batch.lengths[-1]) - start, end - start)
        write(text.tail(arguments.start_offset))
    if bad:
        msg = (
            f"{printable(arguments.image)}: tables: found {bad} extents whose entries point "
            "nowhere, expected offsets inside the file (see: qedimg check)"
        )
        raise CorruptImageError(msg)
