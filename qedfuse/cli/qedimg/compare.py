"""``qedimg compare``: compare the content of two disks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_error, print_json, print_line
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.copying.compare import Comparison
    from qedfuse.util.backgroundtasks import Progress

EXAMPLE: Final = "qedimg compare -f raw disk.raw disk.qed"
DESCRIPTION: Final = """\
Compare the content of two disks: QED images with their chains, raw files, or block
devices.  How the content is stored does not matter.  If one disk is longer, its content
past the end of the other must be zeros.  The offset of the first byte that differs is
printed.

With -s the disks must also have the same size, and data must be stored in the same
ranges, even if the data is zeros.

FIRST and SECOND may be URLs: https://, s3://, gs://, az://, nbd:// and others."""

SAME: Final = 0
DIFFERENT: Final = 1
FAILED: Final = 2
UNREADABLE: Final = 4
EXIT_CODES: Final = {
    SAME: "identical",
    DIFFERENT: "different",
    FAILED: "a disk cannot be opened, or the command line is invalid",
    UNREADABLE: "a disk cannot be read",
    70: "a bug",
    130: "interrupted",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("first", metavar="FIRST")
    parser.add_argument("second", metavar="SECOND")
    formats = ("auto", "raw", "qed")
    parser.add_argument(
        "-f",
        dest="first_format",
        choices=formats,
        default="auto",
        help="format of FIRST; auto (default): detected",
    )
    parser.add_argument(
        "-F",
        dest="second_format",
        choices=formats,
        default="auto",
        help="format of SECOND; auto (default): detected",
    )
    parser.add_argument(
        "-s", "--strict", action="store_true", help="compare size and allocation as well"
    )
    common.add_output(parser)
    common.add_share(parser)
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare the disks, and print the result; return the exit code."""
    with progress(arguments, "Comparing") as on_progress:
        result = run_async(_work, arguments, on_progress)
    if isinstance(result, str):
        print_error(result)
        return UNREADABLE
    if arguments.output == "json":
        print_json(
            {
                "identical": result.identical,
                "reason": result.reason,
                "offset": result.offset,
                "sizes": list(result.sizes),
            }
        )
    else:
        _print(arguments, result)
    return SAME if result.identical else DIFFERENT


async def _work(arguments: argparse.Namespace, on_progress: Progress) -> Comparison | str:
    """Compare the disks, and return the result; if a disk cannot be read, return a message."""
    from qedfuse.errors import QedError  # noqa: PLC0415  imported late: --help must not load it
    from qedfuse.tools.copying.compare import compare  # noqa: PLC0415
    from qedfuse.tools.source.source import open_source  # noqa: PLC0415

    options = common.open_options(arguments)
    async with (
        open_source(arguments.first, arguments.first_format, options) as first,
        open_source(arguments.second, arguments.second_format, options) as second,
    ):
        try:
            return await compare(first, second, strict=arguments.strict, progress=on_progress)
        except QedError as error:
            return str(error)


def _print(arguments: argparse.Namespace, result: Comparison) -> None:
    """Print the result in qemu-img's words."""
    shorter, longer = sorted(result.sizes)
    differ_within_shorter = result.offset is not None and result.offset < shorter
    if shorter != longer and not (arguments.strict or differ_within_shorter):
        print_line(arguments, "Warning: Image size mismatch!")
    if result.identical:
        print_line(arguments, "Images are identical.")
    elif result.reason == "size":
        print_line(arguments, "Strict mode: Image size mismatch!")
    elif result.reason == "allocation":
        print_line(arguments, f"Strict mode: Offset {result.offset} block status mismatch!")
    else:
        print_line(arguments, f"Content mismatch at offset {result.offset}!")
