"""``qedimg convert``: copy a disk into another format, or a chain into one image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.geometry import (
    add_base,
    add_geometry,
    find_base,
    given_geometry_flags,
    take_options,
    warn_unless_qemu_opens,
)
from qedfuse.cli.qedimg.output import print_line
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.errors import UsageError
from qedfuse.text import printable

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.copying.conversion import ConvertResult
    from qedfuse.tools.copying.imagespec import ImageSpec

EXAMPLE: Final = "qedimg convert -p -f raw disk.raw vm.qed"
DESCRIPTION: Final = """\
Copy the disk of SOURCE into a new file TARGET.  A source with backing files becomes
one image, unless -B names a base for the new image.  SOURCE is an image, a raw file or a
block device, or - for raw content from standard input.  TARGET is a file, or - for raw
content to standard output.  Long runs of zeros take no space in TARGET (see -S).  Formats
other than raw and QED need qemu-nbd (SOURCE) or qemu-img (TARGET).

SOURCE may be a URL: https://, s3://, gs://, az://, nbd:// and others."""

_MAX_STREAMS: Final = 16
"""Maximum value of ``-m``, the number of chunks that are copied in parallel."""
_NATIVE_FORMATS: Final = ("raw", "qed")
"""The formats of a target for which no qemu-img is needed."""
_CACHES: Final = ("writeback", "unsafe")
"""The values of ``-t``; qemu-img has others, too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument(
        "-f", dest="source_format", metavar="FORMAT", help="format of SOURCE: raw or qed (detected)"
    )
    parser.add_argument(
        "-O", dest="format", metavar="FORMAT", default="qed", help="format of TARGET (qed)"
    )
    add_base(
        *(parser, "-B"),
        "make an overlay with only the difference to BASE (a path relative to TARGET's directory)",
    )
    add_geometry(parser)
    parser.add_argument(
        "-S",
        dest="sparse_size",
        metavar="SIZE",
        type=common.size,
        default=4096,
        help="write a run of zeros as data if it is shorter than SIZE; 0: write all zeros as data "
        "(4K)",
    )
    parser.add_argument(
        "-m",
        dest="streams",
        metavar="N",
        type=int,
        default=4,
        help="number of chunks that are copied in parallel, 1 to 16 (4)",
    )
    parser.add_argument(
        "-n",
        dest="into_existing",
        action="store_true",
        help="write into TARGET, which must exist and be at least as large as the disk of SOURCE; "
        "the rest of a larger disk is unchanged; after an interruption old and new content may be "
        "mixed",
    )
    parser.add_argument(
        "-t",
        dest="cache",
        metavar="CACHE",
        choices=_CACHES,
        default="writeback",
        help="writeback (default): TARGET, if not a pipe, is durable when the command ends; "
        "unsafe (default of qemu-img): TARGET is flushed only if it is an existing QED image",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="compare the copy with SOURCE; a new TARGET gets its name only if they are equal",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace TARGET if it exists and is not in use"
    )
    parser.add_argument(
        "-c", dest="compress", action="store_true", help="refused: QED has no compression"
    )
    common.add_share(parser)
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Copy the disk; return 0.

    Raises:
        UsageError: An option is invalid, or options contradict each other.
        BrokenPipeError: TARGET is a pipe whose reading end is closed.
        QedError: The conversion failed, or ``--compare`` has found a difference.
    """
    from qedfuse.tools.copying.convert import convert  # noqa: PLC0415  imported late: --help must not load it

    spec = _image_spec(arguments)
    if spec.format == "qed" and not arguments.into_existing:
        warn_unless_qemu_opens(arguments.target, spec.cluster_size, spec.table_size)
    with progress(arguments, "Converting") as on_progress:

        async def work() -> ConvertResult:
            return await convert(
                arguments.source,
                arguments.target,
                spec,
                source_format=arguments.source_format or "auto",
                into_existing=arguments.into_existing,
                overwrite=arguments.force,
                compare=arguments.compare,
                durable=arguments.cache != "unsafe",
                streams=arguments.streams,
                options=common.open_options(arguments),
                progress=on_progress,
            )

        result = run_async(work)
    if arguments.verbose and result.file_bytes:  # 0 if the target is a pipe
        print_line(
            arguments,
            f"{printable(arguments.target)}: disk of {result.size} bytes, of which "
            f"{result.data_bytes} are data; file of {result.file_bytes} bytes",
        )
    return 0


def _image_spec(arguments: argparse.Namespace) -> ImageSpec:
    """Return the specification of the target; merge ``-o`` and defaults into ``arguments``."""
    from qedfuse.tools.copying.imagespec import ImageSpec  # noqa: PLC0415  imported late: --help must not load it

    if arguments.compress:
        msg = "-c: QED has no compression; qemu-img convert -c makes a compressed qcow2 image"
        raise UsageError(msg)
    if arguments.source_format not in (None, *_NATIVE_FORMATS):
        found = printable(arguments.source_format)
        msg = f"-f: found {found}, expected raw or qed (without -f other formats are detected, and "
        msg += "QEMU reads them)"
        raise UsageError(msg)
    if not 1 <= arguments.streams <= _MAX_STREAMS:
        msg = f"-m: found {arguments.streams}, expected 1 to {_MAX_STREAMS}"
        raise UsageError(msg)
    foreign = ()
    if arguments.format not in _NATIVE_FORMATS:
        foreign, arguments.options = tuple(arguments.options), []
        # These options are passed to qemu-img unparsed.  Only a base is looked for in them, because
        # `convert` refuses a base for such a target.
        arguments.base = arguments.base or find_base(foreign)
    given = given_geometry_flags(arguments)
    if given and arguments.format != "qed":
        msg = f"{given}: found -O {printable(arguments.format)}, expected -O qed"
        if arguments.format != "raw":
            msg += " (options of another format are given with -o)"
        raise UsageError(msg)
    if given and arguments.into_existing:
        msg = f"{given}: found -n, expected a new image (an existing image keeps its geometry)"
        raise UsageError(msg)
    take_options(arguments, "-B")
    return ImageSpec(
        arguments.format,
        arguments.cluster_size,
        arguments.table_size,
        arguments.base,
        arguments.base_format,
        arguments.sparse_size,
        foreign,
    )
