"""``qedimg dump``: show the header or a table, entry by entry."""

from __future__ import annotations

import json
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_json, print_line, table
from qedfuse.cli.qedimg.running import run_async
from qedfuse.errors import UsageError
from qedfuse.remote.address import without_secrets

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncGenerator

    from qedfuse.tools.inspection.dump import EntryRange
    from qedfuse.tools.inspection.rawheader import HeaderField, RawHeader

EXAMPLE: Final = "qedimg dump l2 0 vm.qed"
DESCRIPTION: Final = """\
Show the fields of the header, the entries of the L1 table, or the entries of the L2 table
that L1 entry N points to.  Entries that are 0 are left out.  For each entry a verdict is
shown: ok, zeros, reserved, unaligned, past the end, cut short, or over metadata.  Adjacent
entries with the same verdict are shown as one range if they point to adjacent offsets or have
the same value.  A range has at most 8192 entries.

The command is made for broken images, and shows invalid fields and entries as well.

IMAGE may be a URL: https://, s3://, gs://, az://, nbd:// and others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options and operands."""
    parser.add_argument("structure", choices=("header", "l1", "l2"))
    parser.add_argument(
        "l1_index",
        metavar="N",
        nargs="?",
        help="only for l2: the index of the L1 entry that points to the table",
    )
    parser.add_argument("image", metavar="IMAGE")
    common.add_output(parser)
    common.add_share(parser)
    common.add_remote(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the header or the table; return 0."""
    run_async(_work, arguments, _l1_index(arguments))
    return 0


def _l1_index(arguments: argparse.Namespace) -> int:
    """Return the index of the L1 entry, which ``l2`` requires; 0 for ``header`` and ``l1``."""
    text = arguments.l1_index
    if arguments.structure != "l2":
        if text is not None:
            msg = f"dump {arguments.structure}: found two operands, expected the image only"
            raise UsageError(msg)
        return 0
    if text is None or not (text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS):
        found = "none" if text is None else text
        msg = (
            f"dump l2: index of an L1 entry: found {found}, expected a number of at most "
            f"{_MAX_DIGITS} digits"
        )
        raise UsageError(msg)
    return int(text)


_MAX_DIGITS: Final = 18
"""Maximum number of digits of an index, so that it fits into 64 bits; any valid index has fewer."""


async def _work(arguments: argparse.Namespace, l1_index: int) -> None:
    """Print the header, the L1 table, or the L2 table that an L1 entry points to."""
    from qedfuse.tools.inspection.dump import open_dump  # noqa: PLC0415  imported late: --help must not load it

    remote = common.remote_options(arguments)
    async with open_dump(arguments.image, share=arguments.force_share, remote=remote) as dump:
        if arguments.structure == "header":
            _show_header(arguments, dump.header)
        elif arguments.structure == "l1":
            await _show(arguments, {}, dump.l1())
        else:
            location = {"l1-index": l1_index, "table-offset": await dump.table_offset(l1_index)}
            await _show(arguments, location, dump.l2(l1_index))


def _show_header(arguments: argparse.Namespace, header: RawHeader) -> None:
    """Print the header's fields, and a line for each problem of a field."""
    problems = [str(error) for error in header.problems]
    if arguments.output == "json":
        fields = [
            {
                "name": item.name,
                "offset": item.offset,
                "length": item.length,
                "value": item.value,
                "meaning": _meaning(header, item),
            }
            for item in header.fields
        ]
        print_json(
            {"filename": without_secrets(arguments.image), "fields": fields, "problems": problems}
        )
        return
    rows: list[tuple[object, ...]] = [("Offset", "Field", "Raw", "Value", "Meaning")]
    rows += [
        (
            item.offset,
            item.name,
            f"0x{item.value:0{2 * item.length}x}",
            item.value,
            _meaning(header, item),
        )
        for item in header.fields
    ]
    print_line(arguments, table(rows, right=(0, 3)))
    for line in problems:
        print_line(arguments, f"problem: {line}")


def _meaning(header: RawHeader, item: HeaderField) -> str:
    """Return what the value of a field stands for: magic, names of bits, or its unit."""
    if item.name == "magic":
        return "QED\\0"
    if item.name.endswith("features"):
        bits = header.bits(item.name)
        return ", ".join([*bits.names, *(f"unknown bit {bit}" for bit in bits.unknown)])
    return _UNITS.get(item.name, "bytes")


_UNITS: Final = {"table_size": "clusters", "header_size": "clusters"}
"""The units of the header fields that are not in bytes."""
_COLUMNS: Final = "{:>10}  {:>10}  {:>18}  {:>18}  {:>18}  {}"


async def _show(
    arguments: argparse.Namespace,
    location: dict[str, Any],
    ranges: AsyncGenerator[EntryRange, None],
) -> None:
    """Print ranges of entries as they arrive; ``location`` is added to the head of the JSON."""
    as_json = arguments.output == "json"
    if as_json:
        head = json.dumps({"filename": without_secrets(arguments.image), **location})
        sys.stdout.write(f'{head[:-1]}, "entries": [')
    else:
        print_line(
            arguments,
            _COLUMNS.format("Entry", "Count", "File offset", "Guest offset", "Length", "Verdict"),
        )
    separator = "\n"
    async with aclosing(ranges) as items:
        async for item in items:
            if as_json:
                sys.stdout.write(separator + json.dumps(_as_json(item)))
                separator = ",\n"
            else:
                print_line(arguments, _as_text(item))
    if as_json:
        sys.stdout.write("\n]}\n")


def _as_json(item: EntryRange) -> dict[str, Any]:
    """Return a range of entries as JSON values."""
    return {
        "index": item.index,
        "count": item.count,
        "value": item.value,
        "step": item.step,
        "guest-start": item.guest_start,
        "guest-length": item.guest_length,
        "verdict": item.verdict,
    }


def _as_text(item: EntryRange) -> str:
    """Return a range of entries as a line of the table."""
    return _COLUMNS.format(
        item.index,
        item.count,
        f"0x{item.value:x}",
        f"0x{item.guest_start:x}",
        f"0x{item.guest_length:x}",
        item.verdict,
    )
