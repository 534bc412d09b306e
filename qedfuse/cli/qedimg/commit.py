"""``qedimg commit``: write an overlay's data into its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_line
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.text import printable

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.editing.commit import CommitResult
    from qedfuse.util.backgroundtasks import Progress

EXAMPLE: Final = "qedimg commit -p overlay.qed"
DESCRIPTION: Final = """\
Write the data and zeros of an overlay into its base, which can be QED or raw, and
empty the overlay.  A base that is smaller than the overlay grows.  The disk of the
overlay has the same content at any moment; after an interruption, run the same command
again.

With -b, BASE is any file of the chain below the overlay.  The data and zeros of the
overlay and of the images between the overlay and BASE are written into BASE.  The
overlay is not emptied, and the images between the overlay and BASE become invalid.

A commit into a base makes all other overlays of the base invalid."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("image", metavar="IMAGE")
    common.add_qed_format(parser)
    parser.add_argument(
        "-b",
        "--base",
        metavar="BASE",
        help="write into this file of the chain instead of the overlay's own base; implies -d",
    )
    parser.add_argument(
        "-d",
        "--keep",
        action="store_true",
        help="do not empty the overlay, for example because you will delete it",
    )
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Commit the overlay, and print how much was written; return 0."""
    with progress(arguments, "Committing") as on_progress:
        result = run_async(_work, arguments, on_progress)
    text = (
        f"{printable(arguments.image)}: {result.copied_bytes} bytes of data and "
        f"{result.zero_bytes} bytes of zeros were written into {result.base}"
    )
    if result.size_after > result.size_before:
        text += f"; the base's disk had {result.size_before} bytes and has {result.size_after}"
    if result.free_clusters:
        text += f"; {result.free_clusters} clusters in the base are free (see: qedimg compact)"
    if result.between:
        text += "; the images between the overlay and the base must not be used any more"
    if not arguments.keep and arguments.base is None:
        text += f"; the overlay's file had {result.bytes_before} bytes and has {result.bytes_after}"
    print_line(arguments, text)
    return 0


async def _work(arguments: argparse.Namespace, on_progress: Progress) -> CommitResult:
    """Commit with the options of the command line; return what was done."""
    from qedfuse.tools.editing.commit import commit  # noqa: PLC0415  imported late: --help must not load it

    return await commit(
        arguments.image,
        base=arguments.base,
        keep=arguments.keep,
        options=common.open_options(arguments, writable=True),
        progress=on_progress,
    )
