"""``qedimg create``: create an image, standalone or over a base."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.geometry import (
    add_base,
    add_geometry,
    take_options,
    warn_unless_qemu_opens,
)
from qedfuse.cli.qedimg.output import print_line
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.errors import UsageError
from qedfuse.remote.address import is_url, require_local, shown_name
from qedfuse.text import printable
from qedfuse.tools.common.newbacking import foreign_driver_of_base
from qedfuse.tools.editing.create import create, preallocate

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.common.newbacking import NewBase

EXAMPLE: Final = "qedimg create -b golden.qed vm.qed 20G"
DESCRIPTION: Final = """\
Create an empty image.  With -b the image is an overlay: ranges of its disk that were never
written are read from the base.  The name of the base is stored unchanged; a relative name
is resolved from the directory of the image.  SIZE defaults to the size of the base.

The base may be a URL.  QEMU opens https:// and http:// itself, but no object store.

The base may be in another format, such as qcow2.  Then qemu-nbd must be installed, and the
commands that read the image need --foreign qemu, unless they name the base themselves."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("size", metavar="SIZE", nargs="?", type=common.size)
    common.add_qed_format(parser)
    add_base(parser, "-b", "make an overlay over this file")
    parser.add_argument(
        "-u",
        "--unsafe",
        action="store_true",
        help="do not open the base, which then need not exist; requires -F and SIZE",
    )
    common.add_backing_places(parser)
    common.add_remote(parser)
    add_geometry(parser, "size")
    parser.add_argument(
        "--preallocate",
        choices=("off", "full"),
        default="off",
        help="off (default): allocate no cluster; full: allocate each cluster, and reserve its "
        "space on the host",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace IMAGE if it exists and is not in use"
    )
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Create the image; return 0."""
    require_local(arguments.image)
    take_options(arguments, "-b", "size")
    if arguments.base is None and arguments.unsafe:
        msg = "-u: expected -b as well"
        raise UsageError(msg)
    full = arguments.preallocate == "full"
    if full and arguments.base is not None:
        msg = (
            f"{printable(arguments.image)}: --preallocate full: found a base, expected none, "
            "because a full image reads nothing from a base"
        )
        raise UsageError(msg)
    examined = None
    if arguments.base and not arguments.unsafe:
        if is_url(arguments.base):
            examined = run_async(_examine_url, arguments)
        else:
            names = (arguments.image, arguments.base, arguments.base_format)
            driver = foreign_driver_of_base(*names)
            if driver is not None:
                examined = run_async(_examine_foreign, arguments, driver)
    made = create(
        arguments.image,
        arguments.size,
        cluster_size=arguments.cluster_size,
        table_size=arguments.table_size,
        backing=arguments.base,
        backing_format=arguments.base_format,
        unsafe=arguments.unsafe,
        overwrite=arguments.force,
        fill=partial(_fill, arguments) if full else None,
        examined=examined,
    )
    warn_unless_qemu_opens(made.path, made.cluster_size, made.table_size)
    over_base = ""
    if made.backing is not None:
        over_base = f", over {shown_name(made.backing)} ({made.backing_format})"
    print_line(
        arguments,
        f"{printable(made.path)}: created: {made.size} bytes, clusters of {made.cluster_size} "
        f"bytes, tables of {made.table_size} clusters{over_base}",
    )
    return 0


async def _examine_url(arguments: argparse.Namespace) -> NewBase:
    """Return the size, the format and the version of a base that is a URL."""
    from qedfuse.tools.common.newbacking import examine_url  # noqa: PLC0415  imported late: --help must not load it

    remote = common.remote_options(arguments)
    return await examine_url(arguments.image, arguments.base, arguments.base_format, remote)


async def _examine_foreign(arguments: argparse.Namespace, driver: str) -> NewBase:
    """Return the size, the format and the version of a base that QEMU reads as ``driver``."""
    from qedfuse.tools.common.newbacking import examine_foreign  # noqa: PLC0415  imported late: --help must not load it

    options = common.open_options(arguments)
    return await examine_foreign(arguments.image, arguments.base, driver, options)


def _fill(arguments: argparse.Namespace, path: str) -> None:
    """Allocate each cluster of the new image at ``path``, and show the progress."""
    with progress(arguments, "Allocating") as on_progress:
        run_async(preallocate, path, arguments.image, on_progress)
