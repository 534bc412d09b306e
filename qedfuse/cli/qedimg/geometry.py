"""Options for the geometry and the base of a new image, also in the form of qemu-img's ``-o``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.errors import UsageError
from qedfuse.ondisk.constants import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, ENTRY_BYTES
from qedfuse.ondisk.formats import BACKING_FORMATS
from qedfuse.text import printable
from qedfuse.util.sizes import parse_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

_log = logging.getLogger(__name__)

_DESTINATIONS: Final = {
    "backing_file": "base",
    "backing_fmt": "base_format",
    "cluster_size": "cluster_size",
    "table_size": "table_size",
}
"""The attribute of the parsed arguments for each key of ``-o``."""


def add_geometry(parser: argparse.ArgumentParser, *more: str) -> None:
    """Declare ``--cluster-size``, ``--table-size`` and ``-o``; ``more`` are further ``-o`` keys."""
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
        "-o",
        dest="options",
        metavar="KEY=VALUE[,...]",
        action="append",
        default=[],
        help="the same settings in qemu-img's form, with these keys: "
        f"{', '.join((*_DESTINATIONS, *more))}",
    )


def add_base(parser: argparse.ArgumentParser, flag: str, base_help: str) -> None:
    """Declare ``flag`` with the synonym ``--base`` for a base, and ``-F`` for its format."""
    parser.add_argument(flag, "--base", metavar="BASE", help=base_help)
    parser.add_argument(
        "-F",
        "--base-format",
        choices=BACKING_FORMATS,
        metavar="FORMAT",
        help="format of BASE: raw, qed, or one that QEMU reads, such as qcow2; without -F, BASE "
        "must not be raw",
    )


def given_geometry_flags(arguments: argparse.Namespace) -> str:
    """Return those options of `add_geometry` that were given, for a message; empty if none was.

    Call this before `take_options`, which sets the defaults.
    """
    given = {
        "--cluster-size": arguments.cluster_size is not None,
        "--table-size": arguments.table_size is not None,
        "-o": bool(arguments.options),
    }
    return ", ".join(option for option, is_given in given.items() if is_given)


def warn_unless_qemu_opens(path: str, cluster_size: int, table_size: int) -> None:
    """Log a warning if QEMU refuses images of this geometry.

    QEMU refuses tables of one cluster, and an L1 table that can address 2**64 bytes or more.

    Args:
        path: The new image.
        cluster_size: Bytes in a cluster.
        table_size: Clusters in a table.
    """
    entries = cluster_size * table_size // ENTRY_BYTES
    if table_size == 1 or entries**2 * cluster_size >= 1 << 64:
        _log.warning(
            "%s: QEMU cannot open an image with clusters of %d bytes and tables of %d %s",
            printable(path),
            cluster_size,
            table_size,
            "cluster" if table_size == 1 else "clusters",
        )


def _items(options: Iterable[str]) -> Iterator[str]:
    """Yield the items of the values of ``-o``; two commas stand for one comma in an item."""
    for text in options:
        for item in text.replace(",,", "\0").split(","):
            yield item.replace("\0", ",")


def find_base(options: Iterable[str]) -> str | None:
    """Return the last value of the key ``backing_file`` in ``-o``; None without this key.

    The options can be those of a foreign target format, which `take_options` does not parse.
    """
    names = [item.partition("=")[2] for item in _items(options) if item.startswith("backing_file=")]
    return names[-1] if names else None


def take_options(arguments: argparse.Namespace, base_flag: str, *more: str) -> None:
    """Merge the values of ``-o`` into the other options of ``arguments``.

    The cluster size and the table size get their defaults if no option sets them.

    Args:
        arguments: The parsed command line, which is changed.
        base_flag: The option that names a base, for messages.
        more: Further keys, each with an attribute of the same name that holds a size.

    Raises:
        UsageError: A key or value is invalid, ``-o`` contradicts itself or another option, or a
            format is given without a base.
    """
    names = _DESTINATIONS | {name: name for name in more}
    for item in _items(arguments.options):
        key, equals, value = item.partition("=")
        if not equals or key not in names:
            found, keys = printable(item), ", ".join(names)
            msg = f"option -o: found {found}, expected KEY=VALUE with one of these keys: {keys}"
            raise UsageError(msg)
        if key == "backing_fmt" and value not in BACKING_FORMATS:
            expected = " or ".join(BACKING_FORMATS)
            msg = f"option backing_fmt: found {printable(value)}, expected {expected}"
            raise UsageError(msg)
        if not value:
            msg = f"option {key}: found no value, expected {key}=VALUE"
            raise UsageError(msg)
        wanted = value if key.startswith("backing") else parse_size(value)
        if getattr(arguments, names[key]) not in (None, wanted):
            msg = f"option {key}: found two values, expected one"
            raise UsageError(msg)
        setattr(arguments, names[key], wanted)
    if arguments.cluster_size is None:
        arguments.cluster_size = DEFAULT_CLUSTER_SIZE
    if arguments.table_size is None:
        arguments.table_size = DEFAULT_TABLE_SIZE
    if arguments.base is None and arguments.base_format:
        msg = f"base format: found {arguments.base_format}, expected {base_flag} as well"
        raise UsageError(msg)
