"""The output of ``qedimg map``: each batch of extents is formatted by a few calls.

A call for each of millions of extents would take too long.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from qedfuse.tools.source.runs import BAD, DATA, HOLE, UNALLOCATED, ZEROS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.tools.source.chainruns import ChainRuns

_HEX_ZERO: Final = re.compile(r"^0x0(?= )|(?<=^.{32})0x0(?= )", re.MULTILINE)
"""A zero in the first or the third column of a line, as Python's ``%#x`` prints it."""


_NO_OFFSET: Final = "-               %.0s"
"""The format of a file offset that is not printed: a dash, and a conversion that prints nothing."""


class Writer(Protocol):
    """Formats extents as text."""

    def body(self, batch: ChainRuns) -> str:
        """Return a batch of extents as text."""

    def tail(self, start: int) -> str:
        """Return the end of the output.

        ``start`` is the guest offset at which the listed range begins; it is needed for a list
        without extents.
        """


class HumanWriter:
    """Formats a table of the data extents, like qemu-img; omits the other extents."""

    def __init__(self, names: Sequence[str], unknown_depths: Sequence[int]) -> None:
        """Create a writer; for the arguments see `make_writer`."""
        self._lines = [
            f"%#-16x%#-16x{_NO_OFFSET if depth in unknown_depths else '%#-16x'}"
            f"{name.replace('%', '%%')}\n"
            for depth, name in enumerate(names)
        ]

    def body(self, batch: ChainRuns) -> str:
        """Return a line for each extent of data; an empty text if there is none."""
        data = batch.kinds == DATA
        columns = np.stack((batch.starts, batch.lengths, batch.offsets), axis=1)[data]
        depths = batch.depths[data].tolist()
        lines = self._lines
        text = "".join([lines[depth] for depth in depths]) % tuple(columns.ravel().tolist())
        # qemu-img prints a zero without "0x", as C's %#x does.  Only the line of guest offset 0 can
        # have a zero: at file offset 0 a QED image has its header, and a raw file has the data of
        # guest offset 0.
        return _HEX_ZERO.sub("0  ", text) if len(columns) and not columns[0, 0] else text

    def tail(self, _start: int) -> str:
        """Return nothing: the table has no end mark."""
        return ""


class JsonWriter:
    """Formats JSON like qemu-img since version 8.2, byte for byte."""

    def __init__(self, unknown_depths: Sequence[int], *, continued: bool) -> None:
        """Create a writer; for the arguments see `make_writer`."""
        self._unknown_depths = unknown_depths
        self._lines: dict[int, str] = {}
        self._has_extents = continued

    def body(self, batch: ChainRuns) -> str:
        """Return a line for each extent, after a comma if extents were printed before."""
        has_offset = (batch.kinds == DATA) | (batch.kinds == HOLE)
        if self._unknown_depths:
            has_offset &= ~np.isin(batch.depths, self._unknown_depths)
        columns = np.stack((batch.starts, batch.lengths, batch.offsets), axis=1)
        wanted = np.ones(columns.shape, np.bool_)
        wanted[:, 2] = has_offset
        keys = (batch.depths * _DEPTH_FACTOR + batch.kinds).tolist()
        for key in set(keys) - self._lines.keys():
            depth, kind = divmod(key, _DEPTH_FACTOR)
            self._lines[key] = _json_line(depth, kind, has_offset=depth not in self._unknown_depths)
        text = ",\n".join([self._lines[key] for key in keys]) % tuple(columns[wanted].tolist())
        separator = ",\n" if self._has_extents else ""
        self._has_extents = True
        return separator + text

    def tail(self, start: int) -> str:
        """Return the end of the list.

        As in qemu-img's output, a list without extents gets a line for an extent of length 0.
        """
        empty = "" if self._has_extents else _json_line(0, BAD, has_offset=False) % (start, 0)
        return f"{empty.replace('true', 'false')}]\n"


_DEPTH_FACTOR: Final = 8
"""Greater than any kind of run, so that ``depth * _DEPTH_FACTOR + kind`` stands for both."""


def _json_line(depth: int, kind: int, *, has_offset: bool) -> str:
    """Return the format string of a line of JSON for extents of this depth and kind."""
    words = {
        "present": kind != UNALLOCATED,
        "zero": kind in (UNALLOCATED, ZEROS, HOLE),
        "data": kind == DATA,
        "compressed": False,
    }
    flags = ", ".join(f'"{word}": {str(value).lower()}' for word, value in words.items())
    last = ', "offset": %d' if has_offset and kind in (DATA, HOLE) else ""
    return f'{{ "start": %d, "length": %d, "depth": {depth}, {flags}{last}}}'


def make_writer(
    output: str,
    names: Sequence[str],
    unknown_depths: Sequence[int] = (),
    *,
    continued: bool = False,
) -> Writer:
    """Return the writer for a kind of output.

    Args:
        output: ``json`` or ``human``.
        names: The names of the files, in the order of their depth in the chain.
        unknown_depths: Depths of the files whose offsets are not printed.
        continued: Whether extents were printed before the first call of `Writer.body`.
    """
    if output == "json":
        return JsonWriter(unknown_depths, continued=continued)
    return HumanWriter(names, unknown_depths)
