"""Options that several subcommands share, and the conversion of their values."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qedfuse.errors import UsageError
from qedfuse.ondisk.formats import BACKING_FORMATS
from qedfuse.util.sizes import parse_size

if TYPE_CHECKING:
    from qedfuse.disk.options import OpenOptions
    from qedfuse.remote.address import Address
    from qedfuse.remote.options import RemoteOptions


def size(text: str) -> int:
    """Convert a size such as ``10G`` to bytes, for argparse."""
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_qed_format(parser: argparse.ArgumentParser) -> None:
    """Declare ``-f qed``, which has no effect, for scripts that were written for qemu-img."""
    parser.add_argument("-f", dest="format", choices=("qed",), help="the only supported format")


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
    """Declare the options about backing files, and those of `add_remote`."""
    add_backing_places(parser)
    parser.add_argument(
        "--backing-format",
        choices=BACKING_FORMATS,
        metavar="FORMAT",
        help="format of all backing files, whatever they contain: raw, qed, or one that QEMU reads "
        "(qcow2, vmdk, vdi, vhdx, vpc, parallels, qcow)",
    )
    parser.add_argument(
        "--foreign",
        choices=("off", "qemu"),
        default="off",
        help="what happens to backing files in other formats than QED and raw: qemu: QEMU reads "
        "them; off (default): they are refused",
    )
    parser.add_argument(
        "--backing-url",
        metavar="PREFIX",
        action="append",
        default=[],
        type=_prefix,
        help="allow backing files whose URLs begin with PREFIX, and redirections of web servers to "
        "such URLs; redirections of stores are not limited (may be repeated)",
    )
    parser.add_argument(
        "--base-changed",
        action="store_true",
        help="accept a backing file that has changed since the image was made over it",
    )
    add_remote(parser)


def add_backing_places(parser: argparse.ArgumentParser) -> None:
    """Declare the options about where backing files may lie."""
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


def add_remote(parser: argparse.ArgumentParser) -> None:
    """Declare the options about how URLs are read."""
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        type=_directory,
        help="keep what was read from URLs in DIR ($XDG_CACHE_HOME/qedfuse or ~/.cache/qedfuse)",
    )
    parser.add_argument(
        "--remote-cache-size",
        metavar="SIZE",
        type=_cache_size,
        help="how large the cache may become (default: 5 %% of the file system stay free)",
    )
    parser.add_argument(
        "--remote-timeout",
        metavar="SECONDS",
        type=_deadline,
        default=60.0,
        help="how long a failed request to a server is repeated (60)",
    )
    parser.add_argument(
        "--remote-attempt-timeout",
        metavar="SECONDS",
        type=_deadline,
        default=10.0,
        help="how long one attempt of a request may take (10)",
    )
    parser.add_argument(
        "--remote-connect-timeout",
        metavar="SECONDS",
        type=_deadline,
        default=5.0,
        help="how long connecting to a server may take (5)",
    )
    parser.add_argument(
        "--allow-http", action="store_true", help="allow http:// to other machines, without TLS"
    )
    parser.add_argument(
        "--allow-unpinned",
        action="store_true",
        help="read a URL even if the server sends neither a strong ETag nor Last-Modified; changes "
        "of the file may then go unnoticed",
    )
    parser.add_argument(
        "--credentials",
        metavar="FILE",
        help="read variables such as AWS_ACCESS_KEY_ID from FILE, in lines NAME=VALUE; only "
        "the owner of FILE may have access to it (default: from the environment)",
    )


def _directory(text: str) -> str:
    """Return a path from the command line.

    Raises:
        argparse.ArgumentTypeError: The path is empty, as from an unset variable of a script.
    """
    if not text:
        msg = "found '', expected a path"
        raise argparse.ArgumentTypeError(msg)
    return text


def _cache_size(text: str) -> int:
    """Convert the maximum size of the cache to bytes, for argparse."""
    from qedfuse.remote.options import MIN_CACHE_BYTES  # noqa: PLC0415  imported late: --help must not load it

    value = size(text)
    if value < MIN_CACHE_BYTES:
        msg = f"found {text}, expected at least {MIN_CACHE_BYTES >> 20}M"
        raise argparse.ArgumentTypeError(msg)
    return value


def _prefix(text: str) -> Address:
    """Convert a prefix of URLs for argparse."""
    from qedfuse.remote.address import parse_prefix  # noqa: PLC0415  imported late: --help must not load it

    try:
        return parse_prefix(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _deadline(text: str) -> float:
    """Convert a time limit for servers, in seconds, for argparse.

    Raises:
        argparse.ArgumentTypeError: The text is not a number, or the number is out of range.
    """
    from qedfuse.remote.options import parse_deadline  # noqa: PLC0415  imported late: --help must not load it

    try:
        return parse_deadline(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_progress(parser: argparse.ArgumentParser) -> None:
    """Declare ``-p``, ``--progress``."""
    parser.add_argument(
        "-p",
        "--progress",
        action="store_true",
        help="show the progress immediately, and even if stderr is not a terminal",
    )


def open_options(arguments: argparse.Namespace, *, writable: bool = False) -> OpenOptions:
    """Return the options for opening an image.

    Args:
        arguments: The parsed command line.  Options that the subcommand lacks get their defaults.
        writable: Whether to open the image for writing.  If True, ``-U`` has no effect.

    Raises:
        UsageError: The file of credentials is invalid.
        QedError: The file of credentials cannot be read.
    """
    from qedfuse.disk.options import BackingPolicy, OpenOptions  # noqa: PLC0415  imported late: --help must not load it

    policy = BackingPolicy(
        mode=getattr(arguments, "backing", "confined"),
        directories=tuple(getattr(arguments, "backing_dir", ())),
        format=getattr(arguments, "backing_format", None),
        foreign=getattr(arguments, "foreign", "off"),
        base_changed=getattr(arguments, "base_changed", False),
    )
    return OpenOptions(
        writable=writable,
        force_share=getattr(arguments, "force_share", False) and not writable,
        backing=policy,
        remote=remote_options(arguments),
    )


def remote_options(arguments: argparse.Namespace) -> RemoteOptions:
    """Return the options by which URLs are read; those that the subcommand lacks get defaults.

    Raises:
        UsageError: The file of credentials is invalid.
        QedError: The file of credentials cannot be read.
    """
    from qedfuse.remote.credentials import read_credentials  # noqa: PLC0415  imported late: --help must not load it
    from qedfuse.remote.options import Deadlines, RemoteOptions  # noqa: PLC0415

    usual = Deadlines()
    path = getattr(arguments, "credentials", None)
    return RemoteOptions(
        cache_directory=getattr(arguments, "cache_dir", None),
        cache_bytes=getattr(arguments, "remote_cache_size", None),
        deadlines=Deadlines.limited(
            getattr(arguments, "remote_connect_timeout", usual.connect_seconds),
            getattr(arguments, "remote_attempt_timeout", usual.attempt_seconds),
            getattr(arguments, "remote_timeout", usual.total_seconds),
        ),
        allow_http=getattr(arguments, "allow_http", False),
        allow_unpinned=getattr(arguments, "allow_unpinned", False),
        allowed=tuple(getattr(arguments, "backing_url", ())),
        credentials=() if path is None else read_credentials(path),
        credentials_file=path,
    )
