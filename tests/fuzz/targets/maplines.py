"""The extension of the fast map (``_maplines.c``) with any entries, tables and pending extent."""

from __future__ import annotations

import json
import sys
from array import array
from typing import Final

from qedfuse.tools.inspection import fastmap
from tests.fuzz.targets.drawn import Drawn
from tests.fuzz.targets.target import Target

_CLUSTERS: Final = (4096, 8192, 65536)
_MAX_NAME_BYTES: Final = 64


def check(data: bytes) -> None:
    """Let the extension write the lines for the entries in an input."""
    lines = fastmap._load()
    if lines is None or sys.byteorder != "little":
        return
    drawn = Drawn(data)
    flags, cluster = drawn.number(), drawn.choice(_CLUSTERS)
    low, high, table_bytes = drawn.number(8), drawn.number(8), drawn.number(4)
    pending = array("Q", (drawn.number(8), drawn.number(8), drawn.number(8)))
    before = pending.tolist()
    tables = array("Q", sorted(drawn.number(8) for _ in range(drawn.number() % 16)))
    name = drawn.string()[:_MAX_NAME_BYTES] + b"\n"
    raw = drawn.rest()
    as_json = bool(flags & 1)
    text = lines(raw, cluster, low, high, tables, table_bytes, pending, as_json, name)
    if text is None:
        assert pending.tolist() == before
        return
    if as_json:
        for entry in json.loads(f"[{text.decode().removeprefix(',')}]"):
            assert entry["present"] or entry["zero"]
    else:
        assert text.count(b"\n") <= (1 + len(raw) // 8) * name.count(b"\n")


def seeds() -> list[bytes]:
    """Return valid entries of each kind, for both formats."""
    numbers = (8192, 1 << 30)
    head = b"".join(number.to_bytes(8, "little") for number in numbers)
    head += (4096).to_bytes(4, "little") + bytes(24)
    tables = b"\2" + b"".join(number.to_bytes(8, "little") for number in (8192, 12288))
    entries = [0, 0, 1, 16384, 20480, 24576, 1, 40960, 0, 32768]
    raw = b"".join(value.to_bytes(8, "little") for value in entries)
    return [bytes((flags, 0)) + head + tables + b"\5image" + raw for flags in (0, 1)]


TARGET: Final = Target(
    check,
    seeds,
    tuple(number.to_bytes(8, "little") for number in (1, 4096, 16384, (1 << 64) - 4096, 1 << 63)),
    uses_c=True,
)
