"""``qedimg rebase``: give an overlay another base, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_line
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.ondisk.formats import BACKING_FORMATS
from qedfuse.remote.address import shown_name
from qedfuse.text import printable

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.editing.rebase import RebaseResult
    from qedfuse.util.backgroundtasks import Progress

EXAMPLE: Final = "qedimg rebase -b other.qed -F qed overlay.qed"
DESCRIPTION: Final = """\
Give an overlay another base, or none.  The disk of the overlay keeps its content, because
data of the old base is copied into the overlay where the two bases differ.  If the command
fails or is interrupted, the overlay names one of the two bases, and its disk has the old
content.

With -u only the name and the format of the base change.  Nothing is compared or copied, and
neither base need exist.  Use -u if the base was moved, or was replaced by a file with the
same content."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "-b",
        dest="base",
        metavar="BASE",
        required=True,
        help='the new base, relative to the image\'s directory; "" for none',
    )
    parser.add_argument(
        "-F",
        dest="base_format",
        choices=BACKING_FORMATS,
        metavar="FORMAT",
        help="format of the new base: raw, qed, or one that QEMU reads, such as qcow2; without -F "
        'the base must not be raw; -u requires -F, except for the BASE ""',
    )
    common.add_qed_format(parser)
    parser.add_argument(
        "-u", "--unsafe", action="store_true", help="change only the name and the format"
    )
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Change the base, and print how much was copied; return 0."""
    with progress(arguments, "Rebasing") as on_progress:
        result = run_async(_work, arguments, on_progress)
    base = "no base" if result.backing is None else f"the base {shown_name(result.backing)}"
    text = f"{printable(arguments.image)}: has {base}"
    if not arguments.unsafe:
        text += (
            f"; copied from the old base: {result.copied_bytes} bytes as data, "
            f"{result.zero_bytes} as zeros"
        )
    print_line(arguments, text)
    return 0


async def _work(arguments: argparse.Namespace, on_progress: Progress) -> RebaseResult:
    """Rebase with the options of the command line; return what was done."""
    from qedfuse.tools.editing.rebase import rebase  # noqa: PLC0415  imported late: --help must not load it

    return await rebase(
        arguments.image,
        arguments.base,
        backing_format=arguments.base_format,
        unsafe=arguments.unsafe,
        options=common.open_options(arguments, writable=True),
        progress=on_progress,
    )
