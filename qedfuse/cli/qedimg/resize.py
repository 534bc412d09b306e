"""``qedimg resize``: change the size of the disk."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_line
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.text import printable

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.editing.resize import ResizeResult
    from qedfuse.util.backgroundtasks import Progress

EXAMPLE: Final = "qedimg resize vm.qed +10G"
DESCRIPTION: Final = """\
Change the size of the disk.  The added range reads as zeros, even if the image is an
overlay that is shorter than its base.

A smaller SIZE needs --shrink, and also --force if the image has data past the new end;
the data there is lost.  Shrink the file systems on the disk first."""

_SIGN: Final = re.compile(r"[+-]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("size", metavar="[+|-]SIZE", type=_size_or_change)
    common.add_qed_format(parser)
    parser.add_argument("--shrink", action="store_true", help="let the disk become smaller")
    parser.add_argument(
        "--force",
        action="store_true",
        help="with a smaller SIZE: drop data past the new end; with a larger one: drop data that "
        "another program left past the present end",
    )
    common.add_backing(parser)
    common.add_progress(parser)


def _size_or_change(text: str) -> tuple[int, bool]:
    """Return the operand in bytes, negative for ``-SIZE``, and whether it has a sign."""
    sign = _SIGN.match(text)
    value = common.size(text[1:] if sign else text)
    return (-value if text.startswith("-") else value), sign is not None


def run(arguments: argparse.Namespace) -> int:
    """Change the size, and print the sizes before and after; return 0."""
    with progress(arguments, "Resizing") as on_progress:
        result = run_async(_work, arguments, on_progress)
    text = f"{printable(arguments.image)}: had {result.size_before} bytes, has {result.size_after}"
    if result.size_after < result.size_before:
        text += f"; the file had {result.bytes_before} bytes and has {result.bytes_after}"
        if result.free_clusters:
            text += f"; {result.free_clusters} clusters in the file are free (see: qedimg compact)"
    print_line(arguments, text)
    return 0


async def _work(arguments: argparse.Namespace, on_progress: Progress) -> ResizeResult:
    """Resize with the options of the command line; return what was done."""
    from qedfuse.tools.editing.resize import resize  # noqa: PLC0415  imported late: --help must not load it

    size, relative = arguments.size
    return await resize(
        arguments.image,
        size,
        relative=relative,
        shrink=arguments.shrink,
        force=arguments.force,
        options=common.open_options(arguments, writable=True),
        progress=on_progress,
    )
