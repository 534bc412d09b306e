"""An image remembers the version of a local base, and a change of the base is logged once."""

from __future__ import annotations

import errno
import logging
import os
import zlib
from typing import TYPE_CHECKING

import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.disk.creation.create import create_image
from qedfuse.disk.lookup.baseversion import BaseVersions
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.hostio.newfile import NewFile
from qedfuse.tools.editing.commit import commit
from qedfuse.tools.editing.rebase import rebase

if TYPE_CHECKING:
    from pathlib import Path

ATTRIBUTE = "user.qedfuse.base"
MODIFIED = "found it modified since the image was last opened for writing"
REPLACED = "found it replaced since the image was last opened for writing"
WRITABLE = OpenOptions(writable=True)
ACCEPTING = OpenOptions(backing=BackingPolicy(base_changed=True))


@pytest.fixture
async def overlay(tmp_path: Path) -> Path:
    """Give an overlay over ``base.qed``, which has not been opened yet."""
    await create_image(str(tmp_path / "base.qed"), 1 << 20)
    path = tmp_path / "vm.qed"
    await create_image(str(path), 1 << 20, backing="base.qed")
    return path


def names(directory: Path) -> list[str]:
    """Return the sorted names of the files in a directory."""
    return sorted(path.name for path in directory.iterdir())


def remembers(path: Path) -> bool:
    """Return whether there is a record; assert that there is no file beside the images."""
    assert names(path.parent) == ["base.qed", path.name]
    return ATTRIBUTE in os.listxattr(path)


def replace(path: Path, *, keep_times: bool = False) -> None:
    """Replace a file by a copy of it."""
    status, new = path.stat(), path.with_name("new")
    new.write_bytes(path.read_bytes())
    if keep_times:
        os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(path)


async def warnings(path: Path, options: OpenOptions, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Open an image and close it; return what was logged."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        async with open_disk(str(path), options):
            pass
    return caplog.messages


@pytest.mark.expect_log(MODIFIED)
@pytest.mark.expect_log(REPLACED)
async def test_a_difference_is_logged(overlay: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A base that was modified or replaced is logged until an image over it is written to."""
    base = overlay.with_name("base.qed")
    assert await warnings(overlay, OpenOptions(), caplog) == []
    assert not remembers(overlay)
    assert await warnings(overlay, WRITABLE, caplog) == []
    assert remembers(overlay)
    os.utime(base, ns=(1, 1))
    for options in (OpenOptions(), OpenOptions(), WRITABLE):
        (line,) = await warnings(overlay, options, caplog)
        assert line.startswith(f"{overlay}: backing file {base}: {MODIFIED}")
    for options in (OpenOptions(), WRITABLE):
        assert await warnings(overlay, options, caplog) == []
    replace(base)
    assert await warnings(overlay, ACCEPTING, caplog) == []
    for options in (OpenOptions(), WRITABLE):
        (line,) = await warnings(overlay, options, caplog)
        assert REPLACED in line
    assert await warnings(overlay, WRITABLE, caplog) == []


async def test_a_copy_with_the_same_times_is_the_same(
    overlay: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A base that was restored with its size and its time of modification is not logged."""
    await warnings(overlay, WRITABLE, caplog)
    assert remembers(overlay)
    replace(overlay.with_name("base.qed"), keep_times=True)
    for _ in range(2):
        assert await warnings(overlay, WRITABLE, caplog) == []


@pytest.mark.expect_log(MODIFIED)
@pytest.mark.parametrize("how", ["emptied", "kept", "named"])
async def test_commit_remembers(overlay: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """A commit remembers the version of the base that it has made, so that later ones differ."""
    base = overlay.with_name("base.qed")
    async with open_disk(str(overlay), WRITABLE) as disk:
        await disk.write(0, b"data")
    before = os.getxattr(overlay, ATTRIBUTE)
    if how == "named":
        await commit(str(overlay), base=str(base))
    else:
        await commit(str(overlay), keep=how == "kept")
    assert remembers(overlay)
    assert os.getxattr(overlay, ATTRIBUTE) != before
    assert await warnings(overlay, WRITABLE, caplog) == []
    os.utime(base, ns=(1, 1))
    assert len(await warnings(overlay, WRITABLE, caplog)) == 1


async def test_commit_of_an_image_without_a_record(overlay: Path) -> None:
    """A commit of an image that remembers nothing makes no record."""
    await commit(str(overlay), keep=True)
    assert not remembers(overlay)


def test_new_images_remember(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is created or converted has its record before it has its name."""
    found = []

    def observe(new: NewFile, *, durable: bool = True) -> None:
        found.append(os.listxattr(new.path))
        take_name(new, durable=durable)

    take_name = NewFile.commit
    monkeypatch.setattr(NewFile, "commit", observe)
    for words in (
        ("create", "base.qed", "1M"),
        ("create", "-b", "base.qed", "vm.qed"),
        ("convert", "-B", "base.qed", "-F", "qed", "base.qed", "copy.qed"),
    ):
        monkeypatch.chdir(tmp_path)
        assert main(list(words)) == 0
    assert found == [[], [ATTRIBUTE], [ATTRIBUTE]]


@pytest.mark.expect_log(MODIFIED)
async def test_rebase_remembers(overlay: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A rebase remembers the version of the new base."""
    base = overlay.with_name("base.qed")
    await rebase(str(overlay), str(base))
    os.utime(base, ns=(1, 1))
    policy = BackingPolicy(mode="any")
    assert len(await warnings(overlay, OpenOptions(backing=policy), caplog)) == 1
    await rebase(str(overlay), None, options=OpenOptions(backing=policy))
    assert not remembers(overlay)


async def test_an_unsafe_rebase_forgets(overlay: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After only the name of the base was changed, the next open for writing remembers it."""
    await warnings(overlay, WRITABLE, caplog)
    assert remembers(overlay)
    os.utime(overlay.with_name("base.qed"), ns=(1, 1))
    await rebase(str(overlay), "base.qed", backing_format="qed", unsafe=True)
    assert not remembers(overlay)
    assert await warnings(overlay, WRITABLE, caplog) == []


@pytest.mark.parametrize("name", ["vm.qed.base", ".vm.qed.qedfuse-base", ".vm.qed.base"])
async def test_a_base_is_never_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A base that has the name of a record survives opens, commits and rebases of its overlay."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    for call in ("getxattr", "setxattr", "removexattr"):
        monkeypatch.setattr(os, call, refuse)
    base, overlay = tmp_path / name, tmp_path / "vm.qed"
    await create_image(str(base), 1 << 20)
    await create_image(str(overlay), 1 << 20, backing=name)
    async with open_disk(str(overlay), WRITABLE) as disk:
        await disk.write(0, b"data")
    await commit(str(overlay), keep=True)
    await commit(str(overlay), base=name)
    await commit(str(overlay))
    await rebase(str(overlay), name)
    await rebase(str(overlay), name, backing_format="qed", unsafe=True)
    async with open_disk(str(overlay)) as disk:
        assert await disk.read(0, 4) == b"data"
    await rebase(str(overlay), None)
    async with open_disk(str(base)) as disk:
        assert await disk.read(0, 4) == b"data"
    assert names(tmp_path) == sorted([name, "vm.qed"])


def checksummed(body: bytes) -> bytes:
    """Return a record with a valid checksum."""
    return b"%08x\n" % zlib.crc32(b"base.qed\0" + body) + body


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\xff",
        b"00000000\n1 2.3",
        checksummed(b""),
        checksummed(b"size 2.3"),
        checksummed(b"u1"),
        checksummed(b"\xff 2.3"),
        checksummed(b"1 2.3")[:-1],
        checksummed(b"-1 2.3"),
        checksummed(b"%x 2.3" % (1 << 63)),
        checksummed(b"u1 " + b"f" * 3600 + b" 2.3"),
    ],
)
async def test_a_damaged_record_is_replaced(
    overlay: Path, caplog: pytest.LogCaptureFixture, record: bytes
) -> None:
    """A record that is not valid is ignored, and replaced when the image is opened for writing."""
    assert BaseVersions.decode(record, "base.qed") is None
    os.setxattr(overlay, ATTRIBUTE, record)
    assert await warnings(overlay, WRITABLE, caplog) == []
    assert os.getxattr(overlay, ATTRIBUTE) != record


@pytest.mark.parametrize("call", ["getxattr", "setxattr"])
async def test_a_host_that_refuses(
    overlay: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """If the host refuses to read or to store the record, the image opens without a warning."""
    refused = []

    def refuse(*_: object) -> None:
        refused.append(1)
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, call, refuse)
    assert await warnings(overlay, WRITABLE, caplog) == []
    assert len(refused) == 1
