"""The geometry of a new image and its base, by options of our own or by qemu-img's ``-o``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.errors import UsageError
from qedfuse.ondisk.constants import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE
from qedfuse.text import printable
from qedfuse.util.sizes import parse_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

_NAMES: Final = {
    "backing_file": "base",
    "backing_fmt": "base_format",
    "cluster_size": "cluster_size",
    "table_size": "table_size",
}


def add_geometry(parser: argparse.ArgumentParser, *more: str) -> None:
    """Add ``--cluster-size``, ``--table-size`` and ``-o``, which takes ``more`` keys as well."""
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
        help=f"the same as qemu-img has it: {', '.join((*_NAMES, *more))}",
    )


def add_base(parser: argparse.ArgumentParser, flag: str, meaning: str) -> None:
    """Add ``-F`` and, as ``flag``, the base that it tells about."""
    parser.add_argument(flag, "--base", metavar="BASE", help=f"make an overlay {meaning}")
    parser.add_argument(
        "-F", "--base-format", choices=("raw", "qed"), help="what BASE is (a QED image tells)"
    )


def _items(options: Iterable[str]) -> Iterator[str]:
    """Split what stands behind each ``-o``; qemu-img writes a comma within a value as two."""
    for text in options:
        for item in text.replace(",,", "\0").split(","):
            yield item.replace("\0", ",")


def find_base(options: Iterable[str]) -> str | None:
    """Return the base that ``-o`` names in the words of any format; None for none."""
    names = [item.partition("=")[2] for item in _items(options) if item.startswith("backing_file=")]
    return names[-1] if names else None


def take_options(arguments: argparse.Namespace, base_flag: str, *more: str) -> None:
    """Put what stands behind ``-o`` where the options of our own are, and fill in defaults.

    Args:
        arguments: What the command line says.
        base_flag: The option that names a base.
        more: Keys, and options of our own, that hold sizes besides those of the geometry.

    Raises:
        UsageError: A key is unknown, or something is given twice or without what it needs.
    """
    names = _NAMES | {name: name for name in more}
    for item in _items(arguments.options):
        key, equals, value = item.partition("=")
        if not equals or key not in names:
            found, keys = printable(item), ", ".join(names)
            msg = f"option -o: found {found}, expected KEY=VALUE with one of {keys}"
            raise UsageError(msg)
        if key == "backing_fmt" and value not in ("raw", "qed"):
            msg = f"option backing_fmt: found {printable(value)}, expected raw or qed"
            raise UsageError(msg)
        if not value:
            msg = f"option {key}: found no value, expected {key}=VALUE"
            raise UsageError(msg)
        wanted = value if key.startswith("backing") else parse_size(value)
        if getattr(arguments, names[key]) not in (None, wanted):
            msg = f"option {key}: found it twice, expected it once"
            raise UsageError(msg)
        setattr(arguments, names[key], wanted)
    if arguments.cluster_size is None:
        arguments.cluster_size = DEFAULT_CLUSTER_SIZE
    if arguments.table_size is None:
        arguments.table_size = DEFAULT_TABLE_SIZE
    if arguments.base is None and arguments.base_format:
        msg = f"-F: expected {base_flag} as well"
        raise UsageError(msg)
