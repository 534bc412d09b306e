"""``qedimg commit``: an overlay's data into its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import say
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.text import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from qedfuse.tools.editing.commit import CommitResult

EXAMPLE: Final = "qedimg commit -p overlay.qed"
DESCRIPTION: Final = """\
Write what an overlay holds into its base, which may be QED or raw, and empty the
overlay.  A base that is smaller grows.  At any moment the overlay reads over its
base as it did before; the same command finishes what was interrupted.

With -b all that lies over BASE, a lower file of the chain, goes into it.  The overlay
is kept then, and the images between it and BASE are worthless afterwards.

Other overlays over the same base read differently afterwards: there should be none."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("-f", dest="format", choices=("qed",), help="the only format there is")
    parser.add_argument(
        "-b",
        "--base",
        metavar="BASE",
        help="commit to this file of the chain, and not to the next; implies -d",
    )
    parser.add_argument(
        "-d", "--keep", action="store_true", help="leave the overlay as it is, to be thrown away"
    )
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Commit."""
    with progress(arguments, "Committing") as report:
        result = run_async(_work, arguments, report)
    text = (
        f"{printable(arguments.image)}: {result.copied_bytes} bytes of data and "
        f"{result.zero_bytes} of zeros went into {result.base}"
    )
    if result.size > result.size_before:
        text += f", which had {result.size_before} bytes and has {result.size}"
    if result.free_clusters:
        text += f", {result.free_clusters} clusters in it are free (see: qedimg compact)"
    if result.between:
        text += "; the images between them must not be used any more"
    if not arguments.keep and arguments.base is None:
        text += f"; the overlay's file had {result.bytes_before} bytes and has {result.bytes_after}"
    say(arguments, text)
    return 0


async def _work(arguments: argparse.Namespace, report: Callable[[int, int], None]) -> CommitResult:
    """Do what the arguments say."""
    from qedfuse.tools.editing.commit import commit  # noqa: PLC0415  a quick --help

    return await commit(
        arguments.image,
        base=arguments.base,
        keep=arguments.keep,
        options=common.open_options(arguments, writable=True),
        progress=report,
    )
