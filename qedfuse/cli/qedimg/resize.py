"""``qedimg resize``: another size for the disk."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import say
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.text import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from qedfuse.tools.editing.resize import ResizeResult

EXAMPLE: Final = "qedimg resize vm.qed +10G"
DESCRIPTION: Final = """\
Change the size of the disk.  What is added reads as zeros, also where the image is
an overlay that is shorter than its base.

A disk only becomes smaller with --shrink, and only if the image has no data in the
part that goes, or with --force, which loses it.  Shrink the file systems first."""

_RELATIVE: Final = re.compile(r"[+-]")
_LESS: Final = re.compile(r"-\d+(?:[kmgtpe]i?)?b?", re.IGNORECASE | re.ASCII)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    # "-1G" is a size here, and argparse asks this whether it is an option.
    parser._negative_number_matcher = _LESS  # noqa: SLF001  there is no other way
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("size", metavar="[+|-]SIZE", type=_change)
    parser.add_argument("-f", dest="format", choices=("qed",), help="the only format there is")
    parser.add_argument("--shrink", action="store_true", help="let the disk become smaller")
    parser.add_argument(
        "--force",
        action="store_true",
        help="lose what the image holds past the new end, or past the old one",
    )
    common.add_backing(parser)
    common.add_progress(parser)


def _change(text: str) -> tuple[int, bool]:
    """Read a size, and whether it counts from the present one."""
    sign = _RELATIVE.match(text)
    value = common.size(text[1:] if sign else text)
    return (-value if text.startswith("-") else value), sign is not None


def run(arguments: argparse.Namespace) -> int:
    """Change the size."""
    with progress(arguments, "Resizing") as report:
        result = run_async(_work, arguments, report)
    text = f"{printable(arguments.image)}: had {result.size_before} bytes, has {result.size}"
    if result.size < result.size_before:
        text += f"; the file had {result.bytes_before} bytes and has {result.bytes_after}"
        if result.free_clusters:
            text += f", {result.free_clusters} clusters in it are free (see: qedimg compact)"
    say(arguments, text)
    return 0


async def _work(arguments: argparse.Namespace, report: Callable[[int, int], None]) -> ResizeResult:
    """Do what the arguments say."""
    from qedfuse.tools.editing.resize import resize  # noqa: PLC0415  a quick --help

    size, relative = arguments.size
    return await resize(
        arguments.image,
        size,
        relative=relative,
        shrink=arguments.shrink,
        force=arguments.force,
        options=common.open_options(arguments, writable=True),
        progress=report,
    )
