"""The metadata of an entry of the cache, JSON: a version that can be used, or ValueError."""

from __future__ import annotations

import base64
import json
import os
import zlib
from contextlib import suppress
from typing import Final

from qedfuse.remote.cachemetadata import entry_name, read_metadata
from qedfuse.remote.client import Version
from qedfuse.remote.unitfile import units_of
from tests.fuzz.targets.jsontokens import JSON_TOKENS
from tests.fuzz.targets.scratch import put, scratch
from tests.fuzz.targets.target import Target

NONE, ONE = (base64.b64encode(zlib.compress(needed)).decode() for needed in (b"", b"\1"))
"""The needed units of an object without units, and of one with one unit."""


def check(data: bytes) -> None:
    """Read the metadata in a directory; if they have a version, the directory has its name."""
    name = _name(data)
    directory = scratch("cachemetadata")
    path = directory / name
    with suppress(FileExistsError):
        path.mkdir()
    put(path / "about.json", data)
    try:
        found = read_metadata(str(path))
    except ValueError:
        return
    finally:
        os.unlink(path / "about.json")  # noqa: PTH108  shorter
        path.rmdir()
    version = found.version
    assert type(version.size) is int
    assert version.size >= 0
    assert type(version.etag) is str
    assert version.modified is None or type(version.modified) in (int, float)
    assert found.needed is None or len(found.needed) == units_of(version.size)
    assert entry_name(version) == name
    assert version.is_same(version)


def _name(data: bytes) -> str:
    """Return the name of the directory for the version in the metadata."""
    try:
        found = json.loads(data)["version"]
        version = Version(int(found["size"]), str(found["etag"]), found["modified"])
        return entry_name(version)
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return "version-none"


def seeds() -> list[bytes]:
    """Return metadata with an entity tag, with a time, and with the needed units."""
    return [
        json.dumps({"url": "https://h/x", **about}).encode()
        for about in (
            {"version": {"size": 1 << 20, "etag": '"abc"', "modified": 1.5e9}},
            {"version": {"size": 0, "etag": "", "modified": 1.5e9}, "needed": NONE},
            {"version": {"size": 7, "etag": "", "modified": None}, "needed": ONE},
        )
    ]


TARGET: Final = Target(
    check,
    seeds,
    (
        *JSON_TOKENS,
        b'"size"',
        b'"modified"',
        b'"needed"',
        ONE.encode(),
        b"\xff",
        b"1e300",
    ),
)
