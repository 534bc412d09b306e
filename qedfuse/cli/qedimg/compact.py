"""``qedimg compact``: make the file of an image as short as possible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_json, print_line
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.text import printable

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.editing.compact import CompactResult
    from qedfuse.util.backgroundtasks import Progress

EXAMPLE: Final = "qedimg compact -p vm.qed"
DESCRIPTION: Final = """\
Move the highest clusters of an image into free clusters and shorten the file.  This ends
when no cluster is free, or when no run of free clusters is long enough for the table that
must move next.  Data clusters that hold only zeros are not freed.  The image is sound at
any moment.
After an interruption the clusters that were already moved stay at their new offsets."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("image", metavar="IMAGE")
    common.add_output(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compact the image, and print the length of the file before and after; return 0."""
    with progress(arguments, "Compacting") as on_progress:
        result = run_async(_work, arguments, on_progress)
    if arguments.output == "json":
        print_json(
            {
                "filename": arguments.image,
                "format": "qed",
                "file-size-before": result.bytes_before,
                "file-size": result.bytes_after,
                "clusters-moved": result.moved_clusters,
                "free-clusters": result.free_clusters,
            }
        )
        return 0
    left = f", {result.free_clusters} clusters are still free" if result.free_clusters else ""
    print_line(
        arguments,
        f"{printable(arguments.image)}: the file had {result.bytes_before} bytes and has "
        f"{result.bytes_after}; {result.moved_clusters} clusters moved{left}",
    )
    return 0


async def _work(arguments: argparse.Namespace, on_progress: Progress) -> CompactResult:
    """Compact the image of the command line; return what was done."""
    from qedfuse.tools.editing.compact import compact  # noqa: PLC0415  imported late: --help must not load it

    return await compact(arguments.image, progress=on_progress)
