"""``qedimg warm``: fetch a remote image into the cache before it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_line
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.copying.warm import WarmedFile

EXAMPLE: Final = "qedimg warm s3://images/golden.qed"
DESCRIPTION: Final = """\
Fetch the image at URL, and the backing files at other URLs that --backing-url allows, into the
cache that mounts use.  If a file is a QED image, its tables and its allocated clusters are fetched;
if it is raw, all its bytes are fetched.  What is in the cache is not fetched again, so an
interrupted command can be repeated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("url", metavar="URL")
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """Fetch the image, print how much of each file is in the cache, and return 0.

    Raises:
        QedError: The image or a backing file was not fetched completely.
    """
    from qedfuse.tools.copying.warm import warm  # noqa: PLC0415  imported late: --help must not load it

    with progress(arguments, "Fetching") as on_progress:

        async def fetch() -> list[WarmedFile]:
            options = common.open_options(arguments)
            return await warm(arguments.url, options, progress=on_progress)

        files = run_async(fetch)
    for file in files:
        server_note = ", no server is needed to read it" if file.is_complete else ""
        print_line(
            arguments,
            f"{file.url}: {file.cached_bytes} bytes in the cache, fetched now: "
            f"{file.fetched_bytes}{server_note}",
        )
    return 0
