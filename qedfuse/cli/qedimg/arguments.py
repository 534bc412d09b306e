"""Options that several subcommands share, and how their values are read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qedfuse.errors import UsageError
from qedfuse.util.sizes import parse_size

if TYPE_CHECKING:
    from qedfuse.disk.options import OpenOptions


def size(text: str) -> int:
    """Read a size such as ``10G``, for argparse."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--output human|json``."""
    parser.add_argument(
        "--output",
        choices=("human", "json"),
        default="human",
        help="text for people, or JSON with the keys that qemu-img has (human)",
    )


def add_share(parser: argparse.ArgumentParser) -> None:
    """Add ``-U``."""
    parser.add_argument(
        "-U",
        "--force-share",
        action="store_true",
        help="read beside a program that writes to the image; what is read may be torn",
    )


def add_backing(parser: argparse.ArgumentParser) -> None:
    """Add which backing files may be used."""
    parser.add_argument(
        "--backing",
        choices=("confined", "any", "none"),
        default="confined",
        help="use backing files only from the directory of the image that names them, "
        "from anywhere, or not at all (confined)",
    )
    parser.add_argument(
        "--backing-dir",
        metavar="DIR",
        action="append",
        default=[],
        help="allow backing files from DIR too (may be given again)",
    )
    parser.add_argument(
        "--backing-format",
        choices=("raw", "qed"),
        help="what backing files are taken for, whatever is in them",
    )


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Add ``-p``."""
    parser.add_argument(
        "-p",
        "--progress",
        action="store_true",
        help="show the progress also where stderr is no terminal",
    )


def open_options(
    arguments: argparse.Namespace, *, writable: bool = False, trusted: str | None = None
) -> OpenOptions:
    """Make the options for opening an image from those arguments that the subcommand has.

    Args:
        arguments: What the command line says.
        writable: Whether the image is to be changed.
        trusted: A base that the user named himself.
    """
    from qedfuse.disk.options import BackingPolicy, OpenOptions  # noqa: PLC0415  a quick --help

    policy = BackingPolicy(
        mode=getattr(arguments, "backing", "confined"),
        directories=tuple(getattr(arguments, "backing_dir", ())),
        format=getattr(arguments, "backing_format", None),
        trusted=trusted,
    )
    return OpenOptions(
        writable=writable,
        force_share=getattr(arguments, "force_share", False) and not writable,
        backing=policy,
    )
