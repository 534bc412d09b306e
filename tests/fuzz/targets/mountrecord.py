"""Mount records in JSON, which root reads from files of every user; only valid ones are used."""

from __future__ import annotations

import json
import os
from typing import Final

from qedfuse.errors import HostError, UsageError
from qedfuse.mount.optionparser import parse_options
from qedfuse.mount.optionsyntax import absolute_options
from qedfuse.mount.system.mountrecord import MountRecord, format_record, has_ended, read_record
from qedfuse.text import printable
from tests.fuzz.targets.jsontokens import JSON_TOKENS
from tests.fuzz.targets.scratch import put, scratch
from tests.fuzz.targets.target import Target, assert_line

_NAME: Final = "0:42.1234"


def check(data: bytes) -> None:
    """Read a record, and use it as ``qedfuse umount`` and a remount do."""
    record = _read(data)
    if record is None:
        return
    assert _read(format_record(record)) == record, "a record that is written differs"
    try:
        has_ended(record)
    except HostError as error:
        assert_line(error)
    for name in (record.mountpoint, record.failure or "", *record.sources):
        assert printable(name).isprintable()
    try:
        parse_options(absolute_options(record.options), sloppy=True)
    except UsageError as error:
        assert_line(error)


def _read(data: bytes) -> MountRecord | None:
    """Write a record, and read it by the descriptor of its directory."""
    directory = scratch("mountrecord")
    put(directory / _NAME, data)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return read_record(fd, _NAME, os.geteuid())
    finally:
        os.close(fd)


def seeds() -> list[bytes]:
    """Return records of a running and of a failed server, and one of an earlier version."""
    running = MountRecord(1234, 5678, "/mnt/x", ("/a.qed", "/b.qed"), options=("ro",), mounted=9)
    failed = MountRecord(1, 0, "/mnt", (), failure="no space", exit_code=2)
    early = {"pid": 1, "started": 2, "mountpoint": "/m", "sources": ["/x"]}
    return [format_record(running), format_record(failed), json.dumps(early).encode()]


TARGET: Final = Target(
    check,
    seeds,
    (
        *JSON_TOKENS,
        b'"pid"',
        b'"options"',
        b'"failure"',
        b"\xff",
        b"Infinity",
        b"1.0",
    ),
)
