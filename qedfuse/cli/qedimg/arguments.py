"""Options that several subcommands share, and the conversion of their values."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qedfuse.errors import UsageError
from qedfuse.util.sizes import parse_size

if TYPE_CHECKING:
    from qedfuse.disk.options import OpenOptions


def size(text: str) -> int:
    """Convert a size such as ``10G`` to bytes, for argparse.

    Raises:
        argparse.ArgumentTypeError: The text is no size.
    """
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_output(parser: argparse.ArgumentParser) -> None:
    """Declare ``--output human|json``."""
    parser.add_argument(
        "--output",
        choices=("human", "json"),
        default="human",
        help="human (default): text; json: JSON, with qemu-img's keys where they exist",
    )


def add_share(parser: argparse.ArgumentParser) -> None:
    """Declare ``-U``, ``--force-share``."""
    parser.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="read even if another program has the image open for writing; reads may mix old "
        "and new data",
    )


def add_backing(parser: argparse.ArgumentParser) -> None:
    """Declare ``--backing``, ``--backing-dir`` and ``--backing-format``."""
    parser.add_argument(
        "--backing",
        choices=("confined", "any", "none"),
        default="confined",
        help="use backing files only from the directory of the image that names them "
        "(confined, the default), from anywhere (any), or not at all (none)",
    )
    parser.add_argument(
        "--backing-dir",
        metavar="DIR",
        action="append",
        default=[],
        help="allow backing files from DIR too (may be repeated)",
    )
    parser.add_argument(
        "--backing-format",
        choices=("raw", "qed"),
        help="format of all backing files, whatever they contain",
    )


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Declare ``-p``, ``--progress``."""
    parser.add_argument(
        "-p",
        "--progress",
        action="store_true",
        help="show the progress immediately, and even if stderr is no terminal",
    )


def open_options(arguments: argparse.Namespace, *, writable: bool = False) -> OpenOptions:
    """Return the options for opening an image.

    Args:
        arguments: The parsed command line.  An option that the subcommand does not have gets
            its default.
        writable: Whether to open the image for writing; if so, ``-U`` has no effect.
    """
    from qedfuse.disk.options import BackingPolicy, OpenOptions  # noqa: PLC0415  imported late: --help must not load it

    policy = BackingPolicy(
        mode=getattr(arguments, "backing", "confined"),
        directories=tuple(getattr(arguments, "backing_dir", ())),
        format=getattr(arguments, "backing_format", None),
    )
    return OpenOptions(
        writable=writable,
        force_share=getattr(arguments, "force_share", False) and not writable,
        backing=policy,
    )
