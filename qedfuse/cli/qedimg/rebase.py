"""``qedimg rebase``: another base, or none."""

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

    from qedfuse.tools.editing.rebase import RebaseResult

EXAMPLE: Final = "qedimg rebase -b other.qed -F qed overlay.qed"
DESCRIPTION: Final = """\
Give an overlay another base, or none, while its disk keeps its content: where the new
base shows something else, the overlay takes over what the old one showed.  At any
moment the overlay names one of the two, and has the same content over it.

With -u the name alone changes, and neither base is looked at: for a base that was
moved, or replaced by one with the same content."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "-b",
        dest="base",
        metavar="BASE",
        required=True,
        help='the new base, seen from the image\'s directory; "" for none',
    )
    parser.add_argument(
        "-F",
        dest="base_format",
        choices=("raw", "qed"),
        help="what the new base is; found out if it is QED",
    )
    parser.add_argument("-f", dest="format", choices=("qed",), help="the only format there is")
    parser.add_argument("-u", "--unsafe", action="store_true", help="change the name alone")
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Change the base."""
    with progress(arguments, "Rebasing") as report:
        result = run_async(_work, arguments, report)
    base = "no base" if result.backing is None else f"the base {printable(result.backing)}"
    text = f"{printable(arguments.image)}: has {base}"
    if not arguments.unsafe:
        text += (
            f"; {result.copied_bytes} bytes of the old one taken over as data, "
            f"{result.zero_bytes} as zeros"
        )
    say(arguments, text)
    return 0


async def _work(arguments: argparse.Namespace, report: Callable[[int, int], None]) -> RebaseResult:
    """Do what the arguments say."""
    from qedfuse.tools.editing.rebase import rebase  # noqa: PLC0415  a quick --help

    return await rebase(
        arguments.image,
        arguments.base,
        backing_format=arguments.base_format,
        unsafe=arguments.unsafe,
        options=common.open_options(arguments, writable=True),
        progress=report,
    )
