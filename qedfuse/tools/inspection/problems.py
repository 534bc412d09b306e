"""The problems of an image that can be found in its header, L1 table and backing file name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qedfuse.check.headernotes import header_notes
from qedfuse.errors import NotQedError, UsageError
from qedfuse.remote.address import is_below, is_url, parse_address, shown_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qedfuse.errors import QedError
    from qedfuse.remote.address import Address
    from qedfuse.tools.inspection.l1summary import L1Summary
    from qedfuse.tools.inspection.nameresolution import BackingName
    from qedfuse.tools.inspection.rawheader import RawHeader

L1_DAMAGE: Final = frozenset({"l1-wild", "table-overlap"})
"""Codes of the problems with L1 entries; an image with one of them is not `QedInfo.sound`."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An error of an image, or an unusual property.

    Attributes:
        code: Identifier of the kind of problem, for scripts.
        message: One line for the user.
        fatal: Whether every mount refuses the image because of it, even a read-only mount.
    """

    code: str
    message: str
    fatal: bool


def header_problems(raw: RawHeader, file_size: int, name: str) -> Iterator[Problem]:
    """Yield the errors of a header, then its unusual properties, which are not fatal."""
    for error in raw.problems:
        yield Problem(_code(error), str(error), fatal=True)
    if raw.header is not None:
        for finding in header_notes(raw.header, file_size, name):
            yield Problem(finding.code.value, finding.message, fatal=False)


def _code(error: QedError) -> str:
    """Return the code for an error of the header."""
    field = getattr(error, "field", None)
    if field is not None:
        return f"bad-{field.replace('_', '-')}"
    return "truncated-header" if isinstance(error, NotQedError) else "unknown-features"


def l1_problems(summary: L1Summary, file_size: int, name: str) -> Iterator[Problem]:
    """Yield the problems of an L1 table.

    Only an L1 table that the host cannot read is fatal, because every mount reads this table.
    """
    if summary.failure:
        msg = f"{name}: L1 table: cannot be read: {summary.failure}"
        yield Problem("l1-unreadable", msg, fatal=True)
    if summary.invalid:
        msg = (
            f"{name}: L1 table: found {summary.invalid} entries that point to no table, expected "
            f"offsets of whole tables inside the file of {file_size} bytes, past the header and "
            "outside the L1 table"
        )
        yield Problem("l1-wild", msg, fatal=False)
    if summary.overlapping:
        msg = (
            f"{name}: L1 table: found {summary.overlapping} tables that share clusters with "
            "another table, expected each table to have clusters of its own"
        )
        yield Problem("table-overlap", msg, fatal=False)


def backing_problems(
    raw: RawHeader,
    backing: BackingName | str | None,
    name: str,
    allowed: Sequence[Address] = (),
) -> Iterator[Problem]:
    """Yield the problems of a backing file name; yield nothing if ``backing`` is None.

    A valid URL is not fatal, because the user can allow it.

    Args:
        raw: The header.
        backing: The backing file, or why the host could not read its name; None if there is none.
        name: Name of the image in messages.
        allowed: The prefixes of the URLs that the user has allowed.
    """
    if backing is None:
        return
    if isinstance(backing, str):
        msg = f"{name}: backing file name: cannot be read: {backing}"
        yield Problem("backing-name-unreadable", msg, fatal=True)
        return
    found, expected = len(os.fsencode(backing.name)), raw.values["backing_filename_size"]
    if found < expected:
        msg = f"{name}: backing file name: found {found} bytes, expected {expected}"
        yield Problem("backing-name-cut-short", msg, fatal=True)
    shown = shown_name(backing.name)
    if is_url(backing.name):
        yield from _url_problems(backing.name, name, allowed)
    elif backing.scheme is not None:
        msg = f"{name}: backing file {shown}: found a protocol, expected a plain path"
        yield Problem("backing-scheme", msg, fatal=True)
    if backing.is_local:
        msg = (
            f"{name}: backing file {shown}: found a local file, expected a URL, because the image "
            "is on a server"
        )
        yield Problem("backing-local", msg, fatal=True)
    if "\0" in backing.name:
        msg = f"{name}: backing file name: found a NUL byte in {shown}"
        yield Problem("backing-nul", msg, fatal=True)


def _url_problems(url: str, name: str, allowed: Sequence[Address]) -> Iterator[Problem]:
    """Yield the problem of a URL as a backing file, if there is one; see `backing_problems`."""
    try:
        address = parse_address(url)
    except UsageError as error:
        yield Problem("backing-scheme", f"{name}: backing file {error}", fatal=True)
        return
    if not any(is_below(address, prefix) for prefix in allowed):
        shown = shown_name(url)
        msg = f"{name}: backing file {shown}: found a URL, which must be allowed (backing_url)"
        yield Problem("backing-url", msg, fatal=False)
