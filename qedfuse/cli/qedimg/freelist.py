"""``qedimg freelist``: show, write or drop the list of free clusters in an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_json, print_line
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.errors import UsageError
from qedfuse.text import printable
from qedfuse.util.sizes import format_size

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.inspection.freelistinfo import FreeListInfo

EXAMPLE: Final = "qedimg freelist on vm.qed"
DESCRIPTION: Final = """\
"show" describes the list of free clusters in an image, "on" writes a list, and "off"
drops the list.  An image with a list is opened without a scan for free space.  The list
is an extension of the format: QEMU refuses an image that has one, and accepts the image
again after "off".

"on" finds the free clusters, and writes no list if no cluster is free.  A mount for
writing with default options keeps the list of an image that has one: when the mount ends,
it writes an up-to-date list, if possible."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("action", choices=("show", "on", "off"))
    parser.add_argument("image", metavar="IMAGE")
    common.add_output(parser)
    common.add_share(parser)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the action, print the description of the list, and return 0.

    Raises:
        UsageError: -U was given with an action that changes the image.
    """
    if arguments.force_share and arguments.action != "show":
        msg = f"-U: freelist {arguments.action} needs an image that no other program has open"
        raise UsageError(msg)
    with progress(arguments, "Scanning"):  # shows no percentage, because the scan reports none
        info = run_async(_work, arguments)
    if arguments.output == "json":
        print_json({"filename": arguments.image, "format": "qed", **info.as_json()})
    elif arguments.action == "on" and not info.present:
        print_line(
            arguments,
            f"{printable(arguments.image)}: no list was stored: no cluster is free, or the list "
            "would be too long",
        )
    else:
        print_line(arguments, f"{printable(arguments.image)}: {_describe(info)}")
    return 0


async def _work(arguments: argparse.Namespace) -> FreeListInfo:
    """Carry out the action, and return the description of the list that the image has then."""
    from qedfuse.hostio.locking import LockMode  # noqa: PLC0415  imported late: --help must not load it
    from qedfuse.remote.address import require_local  # noqa: PLC0415
    from qedfuse.tools.editing.freelist import drop, enable  # noqa: PLC0415
    from qedfuse.tools.inspection.freelistinfo import describe_free_list  # noqa: PLC0415

    if arguments.action == "on":
        return await enable(arguments.image)
    if arguments.action == "off":
        await drop(arguments.image)
    require_local(arguments.image)
    lock = LockMode.to_read(share=arguments.force_share)
    return await describe_free_list(arguments.image, lock=lock)


def _describe(info: FreeListInfo) -> str:
    """Return the description of the list in a line."""
    if not info.present:
        return "no list of free clusters"
    if not info.valid:
        return f"a list of free clusters that is not valid: {info.problem}"
    return (
        f"a list of {info.clusters} free clusters ({format_size(info.bytes)}) in {info.runs} "
        f"runs; the list itself is stored in {info.list_clusters} of these clusters"
    )
