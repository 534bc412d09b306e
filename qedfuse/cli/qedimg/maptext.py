"""The output of ``qedimg map``, formatted batch by batch: a full disk has millions of extents."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from qedfuse.tools.source.runs import BAD, DATA, HOLE, UNALLOCATED, ZEROS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.tools.source.chainruns import ChainRuns

_HEX_ZERO: Final = re.compile(r"^0x0(?= )|(?<=^.{32})0x0(?= )", re.MULTILINE)
"""A zero in the first or the third column of the table."""


class Writer(Protocol):
    """Formats extents as text."""

    def body(self, batch: ChainRuns) -> str:
        """Return a batch of extents as text."""

    def tail(self, start: int) -> str:
        """Return the end of a list, possibly an empty one, that begins at offset ``start``."""


class HumanWriter:
    """Formats the extents that are data as a table, like qemu-img."""

    def __init__(self, names: Sequence[str]) -> None:
        """Create a writer for the files ``names``, in the order of their depth in the chain."""
        self._lines = [f"%#-16x%#-16x%#-16x{name.replace('%', '%%')}\n" for name in names]

    def body(self, batch: ChainRuns) -> str:
        """Return a line for each extent of data."""
        data = batch.kinds == DATA
        columns = np.stack((batch.starts, batch.lengths, batch.offsets), axis=1)[data]
        depths = batch.depths[data].tolist()
        lines = self._lines
        text = "".join([lines[depth] for depth in depths]) % tuple(columns.ravel().tolist())
        # C's %#x prints no 0x before a zero, which only the disk's first extent can have.
        return _HEX_ZERO.sub("0  ", text) if len(columns) and not columns[0, 0] else text

    def tail(self, _start: int) -> str:
        """Return nothing: the table has no end mark."""
        return ""


class JsonWriter:
    """Formats JSON like qemu-img since version 8.2, byte for byte."""

    def __init__(self, *, continued: bool) -> None:
        """Create a writer; ``continued`` means that extents have been printed before."""
        self._lines: dict[int, str] = {}
        self._any = continued

    def body(self, batch: ChainRuns) -> str:
        """Return a line for each extent."""
        placed = (batch.kinds == DATA) | (batch.kinds == HOLE)
        columns = np.stack((batch.starts, batch.lengths, batch.offsets), axis=1)
        wanted = np.ones(columns.shape, np.bool_)
        wanted[:, 2] = placed
        keys = (batch.depths * _KINDS + batch.kinds).tolist()
        for key in set(keys) - self._lines.keys():
            self._lines[key] = _json_line(*divmod(key, _KINDS))
        text = ",\n".join([self._lines[key] for key in keys]) % tuple(columns[wanted].tolist())
        before = ",\n" if self._any else ""
        self._any = True
        return before + text

    def tail(self, start: int) -> str:
        """Return the end of the list, with an empty extent if there was none, like qemu-img."""
        nothing = "" if self._any else _json_line(0, BAD) % (start, 0)
        return f"{nothing.replace('true', 'false')}]\n"


_KINDS: Final = 8


def _json_line(depth: int, kind: int) -> str:
    """Return the format string of a line, for extents of a depth and kind."""
    words = {
        "present": kind != UNALLOCATED,
        "zero": kind in (UNALLOCATED, ZEROS, HOLE),
        "data": kind == DATA,
        "compressed": False,
    }
    flags = ", ".join(f'"{word}": {str(value).lower()}' for word, value in words.items())
    offset = ', "offset": %d' if kind in (DATA, HOLE) else ""
    return f'{{ "start": %d, "length": %d, "depth": {depth}, {flags}{offset}}}'


def make_writer(output: str, names: Sequence[str], *, continued: bool = False) -> Writer:
    """Return the writer for ``output``; ``continued`` means that extents were printed before."""
    return JsonWriter(continued=continued) if output == "json" else HumanWriter(names)
