"""What ``qemu-img map`` prints: the map names only bytes of the files, whatever is printed."""

from __future__ import annotations

import io
import itertools
from typing import Final

from qedfuse.errors import ForeignError
from qedfuse.foreign.mapping import fill_map
from qedfuse.foreign.runmap import UNKNOWN, ZEROS, RunMap
from tests.fuzz.targets.target import Target, assert_line

_FILES: Final = ((0, 1 << 20), None, (1, 4096))
_CAPACITY: Final = 16


def check(data: bytes) -> None:
    """Fill a map, which may end early, and look at all of its runs."""
    run_map = RunMap(_CAPACITY)
    try:
        fill_map(run_map, io.BytesIO(data), _FILES)
    except ForeignError as error:
        assert_line(error)
    sizes = {file[0]: file[1] for file in _FILES if file is not None}
    parts = list(run_map.parts(0, run_map.end))
    assert len(parts) <= _CAPACITY
    assert sum(part.length for part in parts) == run_map.end
    for part, following in itertools.pairwise(parts):
        assert part.start + part.length == following.start
    for part in parts:
        assert part.length > 0
        if part.file not in (UNKNOWN, ZEROS):
            assert 0 <= part.offset < part.offset + part.length <= sizes[part.file]


def seeds() -> list[bytes]:
    """Return output for data in two files, zeros, compressed data and a map that is too long."""
    line = (
        b'{ "start": %d, "length": 4096, "depth": %d, "present": true, "zero": %s, "data": true%s}'
    )
    short = [
        line % (0, 0, b"false", b', "offset": 327680'),
        line % (4096, 2, b"false", b', "offset": 2048'),
        line % (8192, 0, b"true", b""),
        line % (12288, 0, b"false", b', "compressed": true'),
        line % (16384, 1, b"false", b', "offset": 0'),
    ]
    long = [line % (at * 4096, 0, b"false", b', "offset": %d' % (at * 8192)) for at in range(20)]
    return [b"[%s]\n" % b",\n".join(lines) for lines in (short, long)]


TARGET: Final = Target(
    check,
    seeds,
    (
        *(b'"start": ', b'"length": ', b'"depth": ', b'"zero": ', b'"data": ', b'"offset": '),
        *(b"true", b"false", b"null", b"-1", b"1e9", b"4096", b"18446744073709551616", b"0.5"),
        *(b"{", b"}", b"[", b"]", b",", b"\n", b'"', b"NaN", b"4611686018427387904"),
    ),
)
