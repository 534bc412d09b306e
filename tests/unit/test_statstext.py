"""The statistics of a mount as text."""

from __future__ import annotations

import pytest

from qedfuse.cli.qedfuse.statstext import mount_text


@pytest.mark.parametrize(("process", "shown"), [(7, "7"), ("\x1b", r"\x1b")])
def test_escapes_once(process: object, shown: str) -> None:
    """A text is escaped once, whatever else is in its line, and nothing controls a terminal."""
    document = {
        "mountpoint": "/a\n\\b",
        "pid": process,
        "uptime_seconds": 1,
        "resident_bytes": None,
        "sandbox": {"mode": "on", "missing": ["x\r"], "in_force": ["back\\slash"]},
        "disks": [],
    }
    text = mount_text(document)
    first, second = text.splitlines()
    assert first.startswith(rf"/a\n\\b: process {shown}, up 1 s")
    assert second == r"  sandbox on: back\slash; without x\r"
