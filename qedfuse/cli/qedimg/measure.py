"""``qedimg measure``: how much space a copy of a disk would need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.geometry import add_base, add_geometry, take_options
from qedfuse.cli.qedimg.output import print_json, say
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.copying.imagespec import ImageSpec
    from qedfuse.tools.copying.measure import Measurement

EXAMPLE: Final = "qedimg measure --cluster-size 1M disk.raw"
DESCRIPTION: Final = """\
Tell how long the file would be that "qedimg convert" makes of SOURCE with the same
options, and how long it can become once all of its disk has been written to.  SOURCE
is read to find out what is zeros.  With --size it is a new disk that is measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("source", metavar="SOURCE", nargs="?")
    parser.add_argument("--size", metavar="SIZE", type=common.size, help="measure a new disk")
    parser.add_argument("-f", dest="source_format", choices=("raw", "qed"), help="what SOURCE is")
    parser.add_argument(
        "-O", dest="format", metavar="FORMAT", default="qed", help="raw or qed (qed)"
    )
    add_base(parser, "-B", "that holds what differs from BASE")
    add_geometry(parser)
    parser.add_argument(
        "-S",
        dest="sparse_size",
        metavar="SIZE",
        type=common.size,
        default=4096,
        help="count zeros as data in runs shorter than this; 0: always (4K)",
    )
    common.add_output(parser)
    common.add_share(parser)
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print it."""
    from qedfuse.tools.copying.imagespec import ImageSpec  # noqa: PLC0415  a quick --help

    take_options(arguments, "-B")
    spec = ImageSpec(
        arguments.format,
        arguments.cluster_size,
        arguments.table_size,
        arguments.base,
        arguments.base_format,
        arguments.sparse_size,
    )
    found = _measure(arguments, spec)
    if arguments.output == "json":
        print_json({"required": found.required, "fully-allocated": found.fully_allocated})
    else:
        say(arguments, f"required size: {found.required}")
        say(arguments, f"fully allocated size: {found.fully_allocated}")
    return 0


def _measure(arguments: argparse.Namespace, spec: ImageSpec) -> Measurement:
    """Measure a new disk, or a copy.

    Raises:
        UsageError: Neither was named, or both.
    """
    from qedfuse.tools.copying.measure import measure, measure_empty  # noqa: PLC0415  a quick --help

    if (arguments.size is None) == (arguments.source is None):
        found = "neither" if arguments.size is None else "both"
        msg = f"SOURCE, --size: found {found}, expected one of them"
        raise UsageError(msg)
    if arguments.source is None:
        return measure_empty(arguments.size, spec)
    with progress(arguments, "Measuring") as report:

        async def work() -> Measurement:
            return await measure(
                arguments.source,
                spec,
                source_format=arguments.source_format or "auto",
                options=common.open_options(arguments),
                progress=report,
            )

        return run_async(work)
