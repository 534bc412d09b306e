"""The record beside an image: stored, replaced and removed, while no other file is ever hurt."""

from __future__ import annotations

import errno
import os
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qedfuse.errors import HostError
from qedfuse.hostio import baserecord, systemcalls
from qedfuse.hostio.baserecord import (
    read_record,
    record_path,
    remove_record,
    set_attribute,
    write_record_file,
)
from qedfuse.hostio.newfile import NewFile

if TYPE_CHECKING:
    from collections.abc import Iterator

ATTRIBUTE = "user.qedfuse.base"
MAGIC = b"qedfuse: the version of the base of an image\n"
OTHERS = [
    b"",
    b"a base",
    MAGIC,
    MAGIC + b"00000000\n1\nrecord",
    MAGIC + b"%08x\nx\n" % zlib.crc32(b"x\n"),
    MAGIC + b"%08x\n1\n" % zlib.crc32(b"1\n" + bytes(1 << 17)) + bytes(1 << 17),
]
"""Content of files that are not records: the last two are valid but for their number or length."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give a file that stands for an image."""
    path = tmp_path / "vm.qed"
    path.write_bytes(b"image")
    return path


@pytest.fixture
def _no_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the host refuse attributes, as on a file system that has none."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    for name in ("getxattr", "setxattr", "removexattr"):
        monkeypatch.setattr(os, name, refuse)


def names(directory: Path) -> list[str]:
    """Return the sorted names of the files in a directory."""
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file for the block; give its descriptor."""
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def read(path: Path) -> bytes | None:
    """Return the record of an image."""
    with opened(path) as fd:
        return read_record(fd, str(path))


def write(path: Path, record: bytes) -> None:
    """Store a record of an image in a file."""
    with opened(path) as fd:
        write_record_file(fd, str(path), record)


def remove(path: Path) -> None:
    """Remove the record of an image."""
    with opened(path) as fd:
        remove_record(fd, str(path))


def test_an_attribute_holds_the_record(image: Path) -> None:
    """The record is an attribute where the file system has them, and no file is made."""
    assert read(image) is None
    with opened(image) as fd:
        assert set_attribute(fd, b"one")
        assert set_attribute(fd, b"two")
    assert read(image) == b"two" == os.getxattr(image, ATTRIBUTE)
    assert names(image.parent) == ["vm.qed"]
    remove(image)
    assert read(image) is None
    assert os.listxattr(image) == []


def test_a_full_attribute_space_leaves_no_old_record(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a longer record does not fit, the shorter one that was there is removed."""
    os.setxattr(image, ATTRIBUTE, b"old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, opened(image) as fd:
        patch.setattr(os, "setxattr", refuse)
        assert not set_attribute(fd, b"new")
    assert read(image) is None
    write(image, b"new")
    assert read(image) == b"new"


@pytest.mark.usefixtures("_no_attributes")
@pytest.mark.parametrize("name", ["vm.qed", "n" * 255, "\udcff\n"])
def test_a_file_holds_the_record(tmp_path: Path, name: str) -> None:
    """The record is written, replaced and removed as a file, for each name of an image."""
    image = tmp_path / name
    image.write_bytes(b"image")
    with opened(image) as fd:
        assert not set_attribute(fd, b"one")
    remove(image)
    for record in (b"one", b"a longer one\nof two lines", b""):
        write(image, record)
        assert read(image) == record
        assert len(names(tmp_path)) == 2
    remove(image)
    assert read(image) is None
    assert names(tmp_path) == [name]


@pytest.mark.usefixtures("_no_attributes")
def test_a_file_beside_the_target_of_a_link(image: Path) -> None:
    """The record of an image that is opened through a symbolic link lies beside the image."""
    directory = image.with_name("links")
    directory.mkdir()
    link = directory / "link.qed"
    link.symlink_to(image)
    write(link, b"record")
    assert read(image) == read(link) == b"record"
    assert names(directory) == ["link.qed"]


@pytest.mark.usefixtures("_no_attributes")
@pytest.mark.parametrize("content", OTHERS)
def test_another_file_is_never_changed(image: Path, content: bytes) -> None:
    """A file of the record's name that is not a record is neither read, replaced nor removed."""
    other = image.with_name(".vm.qed.qedfuse-base")
    assert str(other) == record_path(str(image))
    other.write_bytes(content)
    status = other.stat()
    assert read(image) is None
    with pytest.raises(HostError, match="found another file, expected none, or a record"):
        write(image, b"record")
    remove(image)
    assert other.read_bytes() == content
    assert other.stat().st_ino == status.st_ino
    assert len(names(image.parent)) == 2


@pytest.mark.usefixtures("_no_attributes")
def test_links_and_fifos_are_never_changed(image: Path) -> None:
    """A symbolic link, a FIFO and a directory of the record's name stay, and nothing waits."""
    real = image.with_name("real")
    write(image, b"record")
    Path(record_path(str(image))).rename(real)
    other = image.with_name(".vm.qed.qedfuse-base")
    other.symlink_to(real)
    for make in (None, os.mkfifo, os.mkdir):
        if make is not None:
            make(other)
        if make is None:
            with pytest.raises(OSError, match="symbolic links"):
                read(image)
        else:
            assert read(image) is None
        with pytest.raises((OSError, HostError)):
            write(image, b"new")
        remove(image)
        assert os.path.lexists(other)
        (os.rmdir if make is os.mkdir else os.unlink)(other)
    assert real.read_bytes().endswith(b"record")


@pytest.mark.usefixtures("_no_attributes")
def test_a_record_of_an_earlier_image(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that another image of the same name left behind is not used, and is replaced."""
    write(image, b"old")
    image.rename(image.with_name("kept.qed"))
    image.write_bytes(b"another image")
    assert read(image) is None
    write(image, b"new")
    assert read(image) == b"new"
    # FAT makes up a new inode number each time, so there the name alone must do.
    with monkeypatch.context() as patch:
        patch.setattr(baserecord, "keeps_inode_numbers", lambda _fd: False)
        write(image, b"fat")
        image.with_name("copy").write_bytes(b"image")
        image.with_name("copy").rename(image)
        assert read(image) == b"fat"
    assert read(image) is None


@pytest.mark.usefixtures("_no_attributes")
def test_an_image_that_has_lost_its_name(image: Path) -> None:
    """Nothing is written beside another image that has taken the name of the open one."""
    with opened(image) as fd:
        image.rename(image.with_name("moved.qed"))
        image.write_bytes(b"another image")
        with pytest.raises(HostError, match="found another file than the open image"):
            write_record_file(fd, str(image), b"record")
    assert not os.path.lexists(record_path(str(image)))


@pytest.mark.usefixtures("_no_attributes")
def test_a_failed_write_keeps_the_old_record(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host is full, the old record stays, and no temporary file does."""
    write(image, b"old")
    struck = []

    def refuse(*_: object) -> None:
        struck.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(baserecord, "write_all", refuse)
        with pytest.raises(OSError, match="No space left"):
            write(image, b"new")
    assert struck
    assert read(image) == b"old"
    assert len(names(image.parent)) == 2


def test_a_new_file_has_no_record_of_the_old_one(image: Path) -> None:
    """A file that replaces an image gets its other attributes, but not its record."""
    os.setxattr(image, ATTRIBUTE, b"old")
    os.setxattr(image, "user.note", b"kept")
    with opened(image) as old, NewFile(str(image), old=old, overwrite=True) as new:
        new.commit()
    assert os.listxattr(image) == ["user.note"]


@pytest.mark.parametrize(("number", "expected"), [(0x4D44, 0), (0x2011BAB0, 0), (0xEF53, 1)])
def test_fat_keeps_no_inode_numbers(
    monkeypatch: pytest.MonkeyPatch, number: int, expected: int
) -> None:
    """FAT and exFAT count as file systems without lasting inode numbers, and so does an error."""
    monkeypatch.setattr(systemcalls, "_file_system_magic", lambda _fd: number)
    assert systemcalls.keeps_inode_numbers(0) is bool(expected)
    monkeypatch.setattr(systemcalls, "_file_system_magic", lambda _fd: None)
    assert not systemcalls.keeps_inode_numbers(0)
