"""``qedimg measure``: compute how much space a copy of a disk would need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.geometry import add_base, add_geometry, given_geometry_flags, take_options
from qedfuse.cli.qedimg.output import print_json, print_line
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.errors import UsageError

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.copying.imagespec import ImageSpec
    from qedfuse.tools.copying.measure import Measurement

EXAMPLE: Final = "qedimg measure -f raw --cluster-size 1M disk.raw"
DESCRIPTION: Final = """\
Compute two sizes of the file that "qedimg convert" would make from SOURCE with the same
options: its size after the conversion, and its size after the whole disk has been written
to.  For a raw copy the first size counts the data only, not the holes.  SOURCE is read to
find ranges of zeros.
With --size in place of SOURCE the sizes are those for a new, empty disk.

SOURCE may be a URL: https://, s3://, gs://, az://, nbd:// and others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("source", metavar="SOURCE", nargs="?")
    parser.add_argument(
        "--size", metavar="SIZE", type=common.size, help="measure a new disk of this size"
    )
    parser.add_argument(
        "-f", dest="source_format", choices=("raw", "qed"), help="format of SOURCE (detected)"
    )
    parser.add_argument(
        "-O",
        dest="format",
        metavar="FORMAT",
        default="qed",
        help="format of the copy: raw or qed (qed)",
    )
    add_base(
        *(parser, "-B"),
        "measure an overlay with only the difference to BASE (a path relative to the working "
        "directory)",
    )
    add_geometry(parser)
    parser.add_argument(
        "-S",
        dest="sparse_size",
        metavar="SIZE",
        type=common.size,
        default=4096,
        help="count a run of zeros as data if it is shorter than SIZE (4K); 0: count all zeros as "
        "data",
    )
    common.add_output(parser)
    common.add_share(parser)
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, and print the sizes; return 0.

    Raises:
        UsageError: An option is invalid, or options contradict each other.
        QedError: The source or the base cannot be opened or read.
    """
    from qedfuse.tools.copying.imagespec import ImageSpec  # noqa: PLC0415  imported late: --help must not load it

    given = given_geometry_flags(arguments)
    if given and arguments.format == "raw":
        msg = f"{given}: found -O raw, expected -O qed"
        raise UsageError(msg)
    take_options(arguments, "-B")
    spec = ImageSpec(
        arguments.format,
        arguments.cluster_size,
        arguments.table_size,
        arguments.base,
        arguments.base_format,
        arguments.sparse_size,
    )
    measured = _measure(arguments, spec)
    if arguments.output == "json":
        print_json({"required": measured.required, "fully-allocated": measured.fully_allocated})
    else:
        print_line(arguments, f"required size: {measured.required}")
        print_line(arguments, f"fully allocated size: {measured.fully_allocated}")
    return 0


def _measure(arguments: argparse.Namespace, spec: ImageSpec) -> Measurement:
    """Return the measurement of a new disk, or of a copy of the source."""
    from qedfuse.tools.copying.measure import measure, measure_empty  # noqa: PLC0415  imported late: --help must not load it

    if (arguments.size is None) == (arguments.source is None):
        found = "neither" if arguments.size is None else "both"
        msg = f"SOURCE, --size: found {found}, expected one of them"
        raise UsageError(msg)
    if arguments.source is None:
        return measure_empty(arguments.size, spec)
    with progress(arguments, "Measuring") as on_progress:

        async def work() -> Measurement:
            return await measure(
                arguments.source,
                spec,
                source_format=arguments.source_format or "auto",
                options=common.open_options(arguments),
                progress=on_progress,
            )

        return run_async(work)
