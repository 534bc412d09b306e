"""``qedimg map``: list data, zeros and holes of a disk, and where they are stored."""

from __future__ import annotations

import sys
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, Final, NamedTuple

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
from qedfuse.errors import CorruptImageError, UsageError
from qedfuse.remote.address import is_url, shown_name
from qedfuse.text import printable
from qedfuse.tools.inspection.fastmap import open_fast_map

if TYPE_CHECKING:
    import argparse

    from qedfuse.tools.inspection.layout import Layout
    from qedfuse.util.backgroundtasks import Progress

EXAMPLE: Final = "qedimg map --output json --start-offset 1G --max-length 64M vm.qed"
DESCRIPTION: Final = """\
List the extents of a disk, those of its bases included: which ranges are data, zeros or
holes, and where in which file they are stored.  The text lists only data.  The JSON
lists all extents, with qemu-img's keys.

If a table entry is invalid, the content of its range is unknown, and the exit code is 13.
The JSON lists such a range with "present" true, "zero" false and "data" false.  A picture
shows how many entries of IMAGE itself, without its bases, are invalid ("bad").

--output picture and svg draw the disk and the file of IMAGE, a QED image.  Data has
the colour of its position on the disk, in the drawing of the file too, so a fragmented
file shows a mixture of colours.

IMAGE may be a URL: https://, s3://, gs://, az://, nbd:// and others."""

HEADS: Final = {"human": f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File\n", "json": "["}
"""The beginning of the output, by the value of ``--output``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument(
        "-f", dest="format", choices=("qed", "raw"), help="format of IMAGE (detected)"
    )
    parser.add_argument(
        "--start-offset",
        "-s",
        metavar="OFFSET",
        type=common.size,
        default=0,
        help="begin at this offset of the disk (0)",
    )
    parser.add_argument(
        "--max-length",
        "-l",
        metavar="SIZE",
        type=common.size,
        help="list at most this much of the disk (up to its end)",
    )
    parser.add_argument(
        "--output",
        choices=("human", "json", "picture", "svg"),
        default="human",
        help="human (default): a table of the data; json: all extents, with qemu-img's keys; "
        "picture: a picture for the terminal; svg: the picture as an SVG document",
    )
    common.add_share(parser)
    common.add_backing(parser)
    common.add_progress(parser)


def run(arguments: argparse.Namespace) -> int:
    """List the extents, or draw a picture; return 0.

    Raises:
        CorruptImageError: There are bad table entries.  All extents, or the whole picture, have
            been printed.
        QedError: The image or a base cannot be opened or read, or an option does not fit a picture.
    """
    if arguments.output in {"picture", "svg"}:
        return _draw(arguments)
    # On a terminal the list itself shows the progress.
    with (
        progress(arguments, "Mapping", bar=not sys.stdout.isatty()) as on_progress,
        ExitStack() as stack,
    ):
        # The fast map keeps its lock until `_list_rest` has ended, so that the list shows one state
        # of the image.
        listed = _list_fast(arguments, on_progress, stack)
        if not listed.is_complete:
            run_async(_list_rest, arguments, listed, on_progress)
    return 0


def _draw(arguments: argparse.Namespace) -> int:
    """Print a picture; return 0, or raise CorruptImageError afterwards for bad entries."""
    if arguments.start_offset or arguments.max_length is not None or arguments.format == "raw":
        msg = f"--output {arguments.output}: found -s, -l or -f raw, expected a whole QED image"
        raise UsageError(msg)
    from qedfuse.cli.qedimg import mappicture  # noqa: PLC0415  imported late: the fast map must not load it

    columns, rows = mappicture.SVG_COLUMNS, mappicture.SVG_ROWS
    if arguments.output == "picture":
        columns, rows = mappicture.terminal_columns(), mappicture.ROWS
    with progress(arguments, "Mapping") as on_progress:
        layout = run_async(_layout, arguments, columns * rows, on_progress)
    if arguments.output == "svg":
        sys.stdout.write(mappicture.svg(layout, shown_name(arguments.image)))
    else:
        colored = mappicture.uses_colors(is_terminal=sys.stdout.isatty())
        sys.stdout.write(mappicture.picture(layout, columns, colored=colored))
    if layout.bad:
        raise _bad_tables(arguments.image, f"{layout.bad} invalid entries")
    return 0


async def _layout(arguments: argparse.Namespace, cells: int, on_progress: Progress) -> Layout:
    """Return the layout of the image, with ``cells`` cells for the file and for the disk."""
    from qedfuse.disk.lookup.imageopening import open_image  # noqa: PLC0415  as above
    from qedfuse.hostio.imagefile import read_header  # noqa: PLC0415  as above
    from qedfuse.tools.inspection.layout import read_layout  # noqa: PLC0415  as above

    options = common.open_options(arguments)
    async with open_image(arguments.image, options.read_lock, options.remote) as file:
        return await read_layout(file, await read_header(file), cells, cells, on_progress)


class _Listed(NamedTuple):
    """How much of the list of extents has been printed.

    Attributes:
        has_head: Whether the beginning of the output (`HEADS`) has been printed.
        has_extents: Whether any extent has been printed.
        end: The offset of the disk up to which extents have been printed.
        is_complete: Whether the whole list has been printed.
    """

    has_head: bool
    has_extents: bool
    end: int
    is_complete: bool = False


def _list_fast(arguments: argparse.Namespace, on_progress: Progress, stack: ExitStack) -> _Listed:
    """Print the extents that the fast map can list, perhaps none; return what was printed.

    The fast map (`open_fast_map`) needs neither numpy nor trio.  It stops before the first extent
    that it cannot list.  ``stack`` keeps the image open and locked.
    """
    nothing = _Listed(has_head=False, has_extents=False, end=arguments.start_offset)
    is_partial = arguments.start_offset or arguments.max_length is not None
    if is_partial or arguments.format == "raw" or _is_silent(arguments):
        return nothing
    if is_url(arguments.image):
        return nothing
    as_json = arguments.output == "json"
    fast_map = stack.enter_context(open_fast_map(arguments.image, share=arguments.force_share))
    if fast_map is None:
        return nothing
    sys.stdout.write(HEADS[arguments.output])
    has_extents = False
    for text in fast_map.lines(as_json=as_json, name=printable(arguments.image)):
        # In JSON each extent begins with a comma, which the first one must not have.
        sys.stdout.write(text if has_extents or not as_json else text.removeprefix(",\n"))
        has_extents = has_extents or bool(text)
        on_progress(fast_map.reached, fast_map.size)
    if fast_map.reached < fast_map.size:
        return _Listed(has_head=True, has_extents=has_extents, end=fast_map.reached)
    if as_json:
        sys.stdout.write("]\n")
    return _Listed(has_head=True, has_extents=True, end=fast_map.size, is_complete=True)


def _is_silent(arguments: argparse.Namespace) -> bool:
    """Return whether ``-q`` suppresses the list: the text table, but not JSON."""
    return bool(arguments.quiet) and arguments.output == "human"


async def _list_rest(arguments: argparse.Namespace, listed: _Listed, on_progress: Progress) -> None:
    """Print the extents that `_list_fast` has not printed, and the end of the list."""
    from qedfuse.cli.qedimg.maptext import make_writer  # noqa: PLC0415  imported late: the fast map must not load it
    from qedfuse.tools.inspection.mapping import open_map  # noqa: PLC0415

    options = common.open_options(arguments)
    async with open_map(arguments.image, arguments.format or "auto", options) as disk_map:
        names = [shown_name(path) for path in disk_map.files]
        unknown = disk_map.unknown_depths
        writer = make_writer(arguments.output, names, unknown, continued=listed.has_extents)
        write = (lambda _text: 0) if _is_silent(arguments) else sys.stdout.write
        if not listed.has_head:
            write(HEADS[arguments.output])
        bad, start = 0, listed.end
        end = disk_map.size
        if arguments.max_length is not None:
            end = min(end, start + arguments.max_length)
        async with aclosing(disk_map.batches(listed.end, arguments.max_length)) as batches:
            async for batch in batches:
                write(writer.body(batch))
                bad += batch.count_bad()
                on_progress(int(batch.starts[-1] + batch.lengths[-1]) - start, end - start)
        write(writer.tail(arguments.start_offset))
    if bad:
        raise _bad_tables(arguments.image, f"{bad} extents with invalid entries")


def _bad_tables(image: str, found: str) -> CorruptImageError:
    """Return the error for bad table entries; ``found`` is their number with a noun."""
    return CorruptImageError(
        f"{shown_name(image)}: tables: found {found}, expected offsets inside the file "
        "(see: qedimg check)"
    )
