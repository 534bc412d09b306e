"""How ``qedimg map`` writes extents, as quick as it goes: a full disk has millions of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from qedfuse.tools.source.runs import BAD, DATA, HOLE, UNALLOCATED, ZEROS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.tools.source.chainruns import ChainRuns

_ZERO: Final = re.compile(r"^0x0(?= )|(?<=^.{32})0x0(?= )", re.MULTILINE)


class Writer(Protocol):
    """Turns extents into text."""

    def body(self, batch: ChainRuns) -> str:
        """Write some extents."""

    def tail(self, start: int) -> str:
        """End a list of extents from ``start`` on, one that may be empty."""


class HumanWriter:
    """Writes the table for people: what is data, and where."""

    def __init__(self, names: Sequence[str]) -> None:
        """Write extents of files with these names, by their depth."""
        self._lines = [f"%#-16x%#-16x%#-16x{name.replace('%', '%%')}\n" for name in names]

    def body(self, batch: ChainRuns) -> str:
        """Write a line for each extent of data."""
        data = batch.kinds == DATA
        columns = np.stack((batch.starts, batch.lengths, batch.offsets), axis=1)[data]
        depths = batch.depths[data].tolist()
        lines = self._lines
        text = "".join([lines[depth] for depth in depths]) % tuple(columns.ravel().tolist())
        # C writes no 0x before a zero, which only the disk's first extent can have.
        return _ZERO.sub("0  ", text) if len(columns) and not columns[0, 0] else text

    def tail(self, _start: int) -> str:
        """Write nothing more."""
        return ""


class JsonWriter:
    """Writes JSON as qemu-img does from version 8.2 on, byte for byte."""

    def __init__(self, *, goes_on: bool) -> None:
        """Write all extents, or with ``goes_on`` those after others."""
        self._lines: dict[int, str] = {}
        self._any = goes_on

    def body(self, batch: ChainRuns) -> str:
        """Write a line for each extent."""
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
        """End the list; qemu-img's is never empty."""
        nothing = "" if self._any else _json_line(0, BAD) % (start, 0)
        return f"{nothing.replace('true', 'false')}]\n"


_KINDS: Final = 8


def _json_line(depth: int, kind: int) -> str:
    """Give the pattern of a line."""
    words = {
        "present": kind != UNALLOCATED,
        "zero": kind in (UNALLOCATED, ZEROS, HOLE),
        "data": kind == DATA,
        "compressed": False,
    }
    flags = ", ".join(f'"{word}": {str(value).lower()}' for word, value in words.items())
    offset = ', "offset": %d' if kind in (DATA, HOLE) else ""
    return f'{{ "start": %d, "length": %d, "depth": {depth}, {flags}{offset}}}'


def make_writer(output: str, names: Sequence[str], *, goes_on: bool = False) -> Writer:
    """Choose how to write; with ``goes_on`` some extents have been written."""
    return JsonWriter(goes_on=goes_on) if output == "json" else HumanWriter(names)
