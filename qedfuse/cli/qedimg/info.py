"""``qedimg info``: describe an image, and report what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.infojson import json_value
from qedfuse.cli.qedimg.infotext import as_text
from qedfuse.cli.qedimg.output import print_json, print_line
from qedfuse.cli.qedimg.partitions import partition_lines, partitions_json
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.hostio.locking import LockMode
from qedfuse.remote.address import is_url
from qedfuse.tools.common.formatprobe import foreign_driver_of
from qedfuse.tools.inspection.info import describe

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.common.formatprobe import FormatChoice
    from qedfuse.tools.inspection.details import Details
    from qedfuse.tools.inspection.info import ImageInfo
    from qedfuse.tools.inspection.partitioninfo import PartitionInfo
    from qedfuse.util.backgroundtasks import Progress

EXAMPLE: Final = "qedimg info --output json vm.qed"
DESCRIPTION: Final = """\
Describe an image: format, sizes, geometry, features, free list, backing file.  The
command also describes images that cannot be mounted, and reports what is wrong with
them.

The backing files of a QED image are opened only with --backing-chain or --partitions, as
far as --backing and --backing-dir allow.  The JSON has qemu-img's keys, and in "safety"
the facts by which a service can decide whether to accept an untrusted image.

--allocation reads all tables, and counts the clusters of data and of zeros.

--partitions reads the partition table of the disk, also from backing files, and finds
the file systems with blkid.

IMAGE may be a URL: https://, s3://, gs://, az://, nbd:// and others.  If QEMU is
installed, IMAGE may also be in one of QEMU's other formats, such as qcow2 or VMDK.  The
backing files of such an image are always opened."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "-f", dest="format", choices=("qed", "raw"), help="format of IMAGE (detected)"
    )
    parser.add_argument(
        "--backing-chain", action="store_true", help="describe the backing files as well"
    )
    parser.add_argument(
        "--allocation", action="store_true", help="count the clusters of data and of zeros"
    )
    parser.add_argument(
        "--partitions", action="store_true", help="list the partitions and their file systems"
    )
    common.add_output(parser)
    common.add_share(parser)
    common.add_backing(parser)


def run(arguments: argparse.Namespace) -> int:
    """Describe the image, or with ``--backing-chain`` the whole chain; return 0."""
    image_format: FormatChoice = arguments.format or "auto"
    if arguments.backing_chain:
        images = run_async(_describe_chain, arguments, image_format)
    elif is_url(arguments.image) or (image_format == "auto" and foreign_driver_of(arguments.image)):
        images = [run_async(_describe_any, arguments, image_format)]
    else:
        lock = LockMode.to_read(share=arguments.force_share)
        images = [describe(arguments.image, image_format, lock=lock, allowed=arguments.backing_url)]
    described = [(image, _details(arguments, image)) for image in images]
    partitions = run_async(_partitions, arguments, image_format) if arguments.partitions else None
    if arguments.output == "json":
        values: list[dict[str, Any]] = [json_value(*item) for item in described]
        if partitions is not None:
            values[0]["partitions"] = partitions_json(partitions)
        print_json(values if arguments.backing_chain else values[0])
    else:
        texts = [as_text(*item) for item in described]
        if partitions is not None:
            texts[0] = "\n".join([texts[0], *partition_lines(partitions)])
        print_line(arguments, "\n\n".join(texts))
    return 0


async def _partitions(arguments: argparse.Namespace, image_format: FormatChoice) -> PartitionInfo:
    """Return the partitions of the disk."""
    from qedfuse.tools.inspection.partitioninfo import describe_partitions  # noqa: PLC0415  imported late: plain info must not load it

    return await describe_partitions(arguments.image, image_format, common.open_options(arguments))


async def _describe_any(arguments: argparse.Namespace, image_format: FormatChoice) -> ImageInfo:
    """Return the description of an image that is a URL, or in a format that QEMU reads."""
    from qedfuse.tools.inspection.chaininfo import describe_any  # noqa: PLC0415  imported late: plain info must not load it

    return await describe_any(arguments.image, image_format, common.open_options(arguments))


async def _describe_chain(
    arguments: argparse.Namespace, image_format: FormatChoice
) -> list[ImageInfo]:
    """Return the descriptions of an image and its backing files, the image first."""
    from qedfuse.tools.inspection.chaininfo import describe_chain  # noqa: PLC0415  imported late: plain info must not load it

    return await describe_chain(arguments.image, image_format, common.open_options(arguments))


def _details(arguments: argparse.Namespace, image: ImageInfo) -> Details | None:
    """Read the tables for ``--allocation``, and the free list; None if neither is needed."""
    if image.qed is None or not (arguments.allocation or image.qed.has_free_list):
        return None
    with progress(arguments, "Counting") as on_progress:
        return run_async(_read_details, arguments, image, on_progress)


async def _read_details(
    arguments: argparse.Namespace, image: ImageInfo, on_progress: Progress
) -> Details:
    """Read the tables if ``--allocation`` was given, and the free list if there is one."""
    from qedfuse.tools.inspection.details import read_details  # noqa: PLC0415  imported late: plain info must not load it

    options = common.open_options(arguments)
    return await read_details(image, options, allocation=arguments.allocation, progress=on_progress)
