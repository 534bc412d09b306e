"""The kernel's read-ahead of a mount: the length that is set, and the message if it cannot be."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from qedfuse.mount.system.readahead import DEFAULT_READAHEAD_BYTES, readahead_bytes, set_readahead

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.mount.system.readahead import Readahead

DEVICE = "0:41"
PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture
def setting(tmp_path: Path) -> Path:
    """Return a mount's file as the kernel has it, with the kernel's value."""
    path = tmp_path / DEVICE / "read_ahead_kb"
    path.parent.mkdir()
    path.write_text("128\n")
    return path


def test_lengths_are_whole_pages() -> None:
    """A length is rounded to whole pages, at least one, and the kernel's own stays unset."""
    assert readahead_bytes(None) == DEFAULT_READAHEAD_BYTES == 1 << 19
    assert readahead_bytes("kernel") is None
    assert readahead_bytes(0) == 0
    assert readahead_bytes(1) == PAGE
    assert readahead_bytes(PAGE) == PAGE
    assert readahead_bytes(PAGE + 1) == 2 * PAGE


@pytest.mark.parametrize(
    ("option", "found"), [(None, "512\n"), (256 << 10, "256\n"), (0, "0\n"), ("kernel", "128\n")]
)
def test_the_length_is_set(tmp_path: Path, setting: Path, option: Readahead, found: str) -> None:
    """The length is written in KiB, without a message."""
    assert set_readahead(DEVICE, option, tmp_path) is None
    assert setting.read_text() == found


def test_what_is_right_is_not_touched(tmp_path: Path, setting: Path) -> None:
    """A length that is right already is not written, so no refusal is reported."""
    setting.write_text("512\n")
    before = setting.stat().st_mtime_ns
    assert set_readahead(DEVICE, None, tmp_path) is None
    assert setting.stat().st_mtime_ns == before


def test_a_refusal_names_the_command_for_root(tmp_path: Path, setting: Path) -> None:
    """A refusal is one line with the length found, the length wanted and a command for root."""
    setting.unlink()
    # A file with a number that the kernel makes read-only, even for root.
    setting.symlink_to("/proc/sys/kernel/ngroups_max")
    assert set_readahead(DEVICE, 4 << 20, tmp_path) == (
        f"the kernel reads ahead 65536 KiB, expected 4096 KiB: {setting}: "
        f"{os.strerror(errno.EACCES)} "
        f"(as root: echo 4096 > {setting}; open files keep the old length)"
    )


def test_a_missing_file_in_sys_is_reported(tmp_path: Path, setting: Path) -> None:
    """A missing or malformed file below /sys is reported in one line."""
    refusal = set_readahead("0:42", None, tmp_path)
    assert refusal is not None
    assert refusal.startswith("the kernel reads ahead an unknown length, expected 512 KiB: ")
    assert os.strerror(errno.ENOENT) in refusal
    assert not (tmp_path / "0:42").exists()
    setting.write_text("much\n")
    refusal = set_readahead(DEVICE, None, tmp_path)
    assert refusal is not None
    assert refusal.isprintable()
