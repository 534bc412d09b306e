"""``qedimg create``: a new image, on its own or over a base."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import say
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.errors import UsageError
from qedfuse.ondisk.constants import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from qedfuse.tools.creation import create, preallocate
from qedfuse.util.sizes import parse_size
from qedfuse.util.text import printable

if TYPE_CHECKING:
    import argparse

_log = logging.getLogger(__name__)

EXAMPLE: Final = "qedimg create -b golden.qed vm.qed 20G"
DESCRIPTION: Final = """\
Make a new, empty image.  With -b it is an overlay: what is never written to it is
read from the base.  The name of a base is stored as it is given; a relative one
begins at the directory of the image.  SIZE may be left out if there is a base."""

_KEYS: Final = ("backing_file", "backing_fmt", "cluster_size", "table_size", "size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the subcommand takes."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("size", metavar="SIZE", nargs="?", type=common.size)
    parser.add_argument("-f", dest="format", choices=("qed",), help="the only format there is")
    parser.add_argument("-b", "--base", metavar="BASE", help="make an overlay over this file")
    parser.add_argument(
        "-F", "--base-format", choices=("raw", "qed"), help="what the base is (a QED image tells)"
    )
    parser.add_argument(
        "-u",
        "--unsafe",
        action="store_true",
        help="do not look at the base, which need not be there; takes -F and SIZE",
    )
    parser.add_argument(
        "--cluster-size",
        metavar="SIZE",
        type=common.size,
        help="bytes in a cluster, a power of two from 4K to 64M (64K)",
    )
    parser.add_argument(
        "--table-size",
        metavar="N",
        type=common.size,
        help="clusters in a table: 1, 2, 4, 8 or 16 (4)",
    )
    parser.add_argument(
        "--preallocate",
        choices=("off", "full"),
        default="off",
        help="full: give each cluster a place in the file, and room on the host (off)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace IMAGE if it is there and not in use"
    )
    parser.add_argument(
        "-o",
        dest="options",
        metavar="KEY=VALUE[,...]",
        action="append",
        default=[],
        help=f"the same as qemu-img has it: {', '.join(_KEYS)}",
    )
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make the image."""
    _take_options(arguments)
    if arguments.base is None and (arguments.base_format or arguments.unsafe):
        msg = f"{'-F' if arguments.base_format else '-u'}: expected -b as well"
        raise UsageError(msg)
    full = arguments.preallocate == "full"
    if full and arguments.base is not None:
        msg = f"{printable(arguments.image)}: --preallocate: a full disk shows nothing of a base"
        raise UsageError(msg)
    made = create(
        arguments.image,
        arguments.size,
        cluster_size=_chosen(arguments.cluster_size, DEFAULT_CLUSTER_SIZE),
        table_size=_chosen(arguments.table_size, DEFAULT_TABLE_SIZE),
        backing=arguments.base,
        backing_format=arguments.base_format,
        unsafe=arguments.unsafe,
        overwrite=arguments.force,
        fill=partial(_fill, arguments) if full else None,
    )
    if made.table_size == 1:
        _log.warning("%s: QEMU opens no image whose tables have one cluster", printable(made.path))
    base = ""
    if made.backing is not None:
        base = f", over {printable(made.backing)} ({made.backing_format})"
    say(
        arguments,
        f"{printable(made.path)}: made: {made.size} bytes, clusters of {made.cluster_size}, "
        f"tables of {made.table_size} clusters{base}",
    )
    return 0


def _fill(arguments: argparse.Namespace, path: str) -> None:
    """Give each cluster a place."""
    with progress(arguments, "Allocating") as report:
        run_async(preallocate, path, report)


def _chosen(value: int | None, default: int) -> int:
    """Fill in a default; 0 is a value, and a wrong one."""
    return default if value is None else value


def _take_options(arguments: argparse.Namespace) -> None:
    """Put what stands behind ``-o`` where the options of our own are.

    Raises:
        UsageError: A key is unknown, or something is given twice.
    """
    for text in arguments.options:
        # qemu-img writes a comma within a value as two.
        for item in text.replace(",,", "\0").split(","):
            key, equals, value = item.replace("\0", ",").partition("=")
            if key not in _KEYS or not equals:
                found, keys = printable(item), ", ".join(_KEYS)
                msg = f"option -o: found {found}, expected KEY=VALUE with one of {keys}"
                raise UsageError(msg)
            if key == "backing_fmt" and value not in ("raw", "qed"):
                msg = f"option backing_fmt: found {printable(value)}, expected raw or qed"
                raise UsageError(msg)
            name = {"backing_file": "base", "backing_fmt": "base_format"}.get(key, key)
            if getattr(arguments, name) is not None:
                msg = f"option {key}: found it twice, expected it once"
                raise UsageError(msg)
            wanted = value if key.startswith("backing") else parse_size(value)
            setattr(arguments, name, wanted)
