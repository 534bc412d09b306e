"""An image remembers the version of its bases, and forgets it when they are changed through it."""

from __future__ import annotations

import errno
import logging
import os
import zlib
from typing import TYPE_CHECKING

import pytest

from qedfuse.disk.creation.create import create_image
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.tools.editing.commit import commit
from qedfuse.tools.editing.rebase import rebase

if TYPE_CHECKING:
    from pathlib import Path

ATTRIBUTE = "user.qedfuse.base"
MODIFIED = "found it modified since the image was first written to"
REPLACED = "found it replaced since the image was first written to"
WRITABLE = OpenOptions(writable=True)


@pytest.fixture(params=["attribute", "file"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give where the record is: an attribute, or a file where the host has no attributes."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    if request.param == "file":
        for name in ("getxattr", "setxattr", "removexattr"):
            monkeypatch.setattr(os, name, refuse)
    return str(request.param)


@pytest.fixture
async def overlay(tmp_path: Path) -> Path:
    """Give an overlay over ``base.qed``, which has not been opened yet."""
    await create_image(str(tmp_path / "base.qed"), 1 << 20)
    path = tmp_path / "vm.qed"
    await create_image(str(path), 1 << 20, backing="base.qed")
    return path


def remembers(path: Path, place: str) -> bool:
    """Return whether there is a record."""
    record = path.with_name(path.name + ".base")
    if place == "file":
        return record.exists()
    assert not record.exists()
    return ATTRIBUTE in os.listxattr(path)


async def warnings(path: Path, options: OpenOptions, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Open an image and close it; return what was logged."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        async with open_disk(str(path), options):
            pass
    return caplog.messages


@pytest.mark.expect_log(MODIFIED)
@pytest.mark.expect_log(REPLACED)
async def test_a_difference_is_logged(
    overlay: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A base that was modified or replaced is logged at each open until it is accepted."""
    base = overlay.with_name("base.qed")
    assert await warnings(overlay, OpenOptions(), caplog) == []
    assert not remembers(overlay, place)
    assert await warnings(overlay, WRITABLE, caplog) == []
    assert remembers(overlay, place)
    os.utime(base, ns=(1, 1))
    for options in (OpenOptions(), WRITABLE, WRITABLE):
        (line,) = await warnings(overlay, options, caplog)
        assert line.startswith(f"{overlay}: backing file {base}: {MODIFIED}")
    new = base.with_name("new")
    new.write_bytes(base.read_bytes())
    new.rename(base)
    (line,) = await warnings(overlay, WRITABLE, caplog)
    assert REPLACED in line
    accepting = OpenOptions(writable=True, backing=BackingPolicy(base_changed=True))
    assert await warnings(overlay, accepting, caplog) == []
    assert await warnings(overlay, WRITABLE, caplog) == []


async def test_a_copy_with_the_same_times_is_the_same(
    overlay: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A base that was restored with its size and its time of modification is not logged."""
    base = overlay.with_name("base.qed")
    await warnings(overlay, WRITABLE, caplog)
    assert remembers(overlay, place)
    status = base.stat()
    new = base.with_name("new")
    new.write_bytes(base.read_bytes())
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(base)
    assert await warnings(overlay, WRITABLE, caplog) == []


@pytest.mark.parametrize("keep", [False, True])
async def test_commit_forgets(
    overlay: Path,
    place: str,
    caplog: pytest.LogCaptureFixture,
    keep: bool,  # noqa: FBT001
) -> None:
    """After a commit to the base, the version of the base is remembered anew."""
    async with open_disk(str(overlay), WRITABLE) as disk:
        await disk.write(0, b"data")
    assert remembers(overlay, place)
    await commit(str(overlay), keep=keep)
    assert not remembers(overlay, place)
    assert await warnings(overlay, WRITABLE, caplog) == []


async def test_rebase_forgets(overlay: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    """After another name of the base was stored, its version is remembered anew."""
    await warnings(overlay, WRITABLE, caplog)
    assert remembers(overlay, place)
    os.utime(overlay.with_name("base.qed"), ns=(1, 1))
    await rebase(str(overlay), "base.qed", backing_format="qed", unsafe=True)
    assert not remembers(overlay, place)
    assert await warnings(overlay, WRITABLE, caplog) == []


CHECKSUM = b"%08x" % zlib.crc32(b"base.qed")


@pytest.mark.parametrize(
    "record",
    [b"", b"\xff", b"00000000\n1 2.3", CHECKSUM, CHECKSUM + b"\n", CHECKSUM + b"\nsize 2.3"],
)
async def test_a_damaged_record_is_replaced(
    overlay: Path, caplog: pytest.LogCaptureFixture, record: bytes
) -> None:
    """A record that is not valid is ignored, and replaced when the image is opened for writing."""
    os.setxattr(overlay, ATTRIBUTE, record)
    assert await warnings(overlay, WRITABLE, caplog) == []
    assert os.getxattr(overlay, ATTRIBUTE) != record
