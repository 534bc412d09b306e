"""Every row of the table in docs/bad-input.md that an image file can cause.

Each image is mounted by the real command.  It must print one line that names the file,
what was found and what was expected, exit with the documented code, and leave the file
unchanged and the mountpoint unmounted.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio

from qedfuse.disk.creation.create import create_image
from tests.support import programs, qemu

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

DISK_BYTES: Final = 64 << 20
CLUSTER_BYTES: Final = 65536
TABLE: Final = 4 * CLUSTER_BYTES
ADDRESS_SPACE_BYTES: Final = 700 << 20
"""Address space that the command may use; hostile images must not need more."""

FIELDS: Final = {
    "magic": (0, "<I"),
    "cluster_size": (4, "<I"),
    "table_size": (8, "<I"),
    "header_size": (12, "<I"),
    "features": (16, "<Q"),
    "compat_features": (24, "<Q"),
    "autoclear_features": (32, "<Q"),
    "l1_table_offset": (40, "<Q"),
    "image_size": (48, "<Q"),
    "backing_filename_offset": (56, "<I"),
    "backing_filename_size": (60, "<I"),
}


@dataclass(frozen=True)
class Image:
    """An image under test."""

    path: Path

    def put(self, field: str, value: int) -> None:
        """Overwrite a header field."""
        offset, layout = FIELDS[field]
        self.patch(offset, struct.pack(layout, value))

    def get(self, field: str) -> int:
        """Read a header field."""
        offset, layout = FIELDS[field]
        data = self.path.read_bytes()
        return int(struct.unpack_from(layout, data, offset)[0])

    def patch(self, offset: int, data: bytes) -> None:
        """Overwrite bytes of the file."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data)

    def entry(self, table: int, index: int) -> int:
        """Read a table entry; ``table`` is the table's file offset."""
        with self.path.open("rb") as file:
            file.seek(table + 8 * index)
            return int(struct.unpack("<Q", file.read(8))[0])

    def put_entry(self, table: int, index: int, value: int) -> None:
        """Overwrite a table entry."""
        self.patch(table + 8 * index, struct.pack("<Q", value))

    def name_backing(self, name: bytes, features: int = 1) -> None:
        """Make the image an overlay of a file called ``name``."""
        self.put("features", features)
        self.put("backing_filename_offset", 64)
        self.put("backing_filename_size", len(name))
        self.patch(64, name)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """Give an image of 64 MiB with six data clusters, as QEMU writes it."""
    path = tmp_path / "bad.qed"
    qemu.create(path, DISK_BYTES)
    qemu.io(path, "write -P 1 0 384k")
    return Image(path)


def digest(path: Path) -> str:
    """Summarize a file's beginning, length, allocation and time of change."""
    status = path.stat()
    with path.open("rb") as file:
        start = hashlib.sha256(file.read(16 << 20)).hexdigest()
    return f"{start} {status.st_size} {status.st_blocks} {status.st_mtime_ns}"


def mount(*arguments: str | Path, limit: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the mount command in the foreground; it must end by itself."""
    patch = f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({ADDRESS_SPACE_BYTES},) * 2)"
    return programs.run("qedfuse", "-f", *arguments, timeout=60, patch=patch if limit else "")


def refused(
    tmp_path: Path, image: Path, code: int, words: tuple[str, ...], *options: str | Path
) -> str:
    """Assert that an image is refused as the table says; give the message."""
    before = digest(image) if image.is_file() else ""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir(exist_ok=True)
    done = mount(image, mountpoint, *options)
    message = done.stderr.rstrip("\n")
    assert done.returncode == code, (done.returncode, message)
    assert message, "no message"
    assert len(message.splitlines()) == 1, message
    assert "Traceback" not in message
    for word in (str(image), *words):
        assert word in message, (word, message)
    assert not os.path.ismount(mountpoint)
    if before:
        assert digest(image) == before, "the image was changed"
    return message


def truncate_to(size: int) -> Callable[[Image], None]:
    """Cut or extend the file to a size."""
    return lambda image: os.truncate(image.path, size)


def header(**fields: int) -> Callable[[Image], None]:
    """Overwrite header fields."""

    def change(image: Image) -> None:
        for field, value in fields.items():
            image.put(field, value)

    return change


REFUSED: Final[dict[str, tuple[Callable[[Image], None], int, tuple[str, ...]]]] = {
    "not-qed": (header(magic=0x12345678), 12, ("magic", "0x12345678", "0x00444551")),
    "empty": (truncate_to(0), 12, ("not a QED image", "found 0 bytes")),
    "header-cut": (truncate_to(60), 12, ("truncated header", "found 60 bytes", "expected 64")),
    "cluster-size-0": (header(cluster_size=0), 12, ("cluster_size", "found 0", "power of two")),
    "cluster-size-odd": (header(cluster_size=65537), 12, ("cluster_size", "found 65537")),
    "cluster-size-small": (header(cluster_size=2048), 12, ("cluster_size", "found 2048")),
    "cluster-size-large": (header(cluster_size=1 << 27), 12, ("cluster_size", str(1 << 27))),
    "table-size-0": (header(table_size=0), 12, ("table_size", "found 0")),
    "table-size-32": (header(table_size=32), 12, ("table_size", "found 32")),
    "table-size-3": (header(table_size=3), 12, ("table_size", "found 3")),
    "header-size": (header(header_size=100), 12, ("header_size", "found 100")),
    "unknown-feature": (header(features=0x10), 14, ("features", "0x10", "bit 4")),
    "unknown-features": (header(features=1 << 63 | 8), 14, ("bit 3, 63",)),
    "l1-zero": (header(l1_table_offset=0), 12, ("l1_table_offset", "found 0")),
    "l1-unaligned": (header(l1_table_offset=65537), 12, ("l1_table_offset", "found 65537")),
    "l1-outside": (header(l1_table_offset=1 << 40), 12, ("l1_table_offset", str(1 << 40))),
    "l1-cut": (truncate_to(CLUSTER_BYTES + TABLE - 1), 12, ("l1_table_offset", "whole table")),
    "size-huge": (header(image_size=1 << 63), 12, ("image_size", str(1 << 63))),
    "size-odd": (header(image_size=513), 12, ("image_size", "found 513", "multiple of 512")),
    "name-outside": (
        header(features=1, backing_filename_offset=65530, backing_filename_size=10),
        12,
        ("backing_filename_offset", "found 65530"),
    ),
    "name-long": (
        header(features=1, backing_filename_offset=64, backing_filename_size=5000),
        12,
        ("backing_filename_size", "found 5000"),
    ),
    "backing-missing": (lambda image: image.name_backing(b"none.raw"), 17, ("none.raw",)),
    "backing-itself": (lambda image: image.name_backing(b"bad.qed"), 17, ("loop",)),
    "backing-json": (
        lambda image: image.name_backing(b'json:{"driver":"null-co"}'),
        17,
        ("json:", "plain path"),
    ),
    "backing-nbd": (lambda image: image.name_backing(b"nbd:x:1"), 17, ("nbd:", "plain path")),
    "backing-device": (lambda image: image.name_backing(b"/dev/zero"), 17, ("/dev/zero", "device")),
    "backing-nul": (lambda image: image.name_backing(b"a\0b"), 17, ("NUL",)),
    "backing-absolute": (lambda image: image.name_backing(b"/etc/passwd"), 17, ("backing_dir",)),
    "backing-dotdot": (
        lambda image: image.name_backing(b"../../../../../../../../etc/passwd"),
        17,
        ("/etc/passwd", "backing=any"),
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_a_bad_header_or_backing_name_is_refused(row: str, image: Image, tmp_path: Path) -> None:
    """A field out of its range is named, with what was found and what was expected."""
    spoil, code, words = REFUSED[row]
    spoil(image)
    refused(tmp_path, image.path, code, words)


@pytest.mark.parametrize("kind", ["directory", "fifo", "link", "loop"])
def test_a_backing_file_of_a_wrong_kind_is_refused(kind: str, image: Image, tmp_path: Path) -> None:
    """A directory, a FIFO, a link to the outside and a loop are refused, each by its kind."""
    base = tmp_path / "base"
    image.name_backing(b"base")
    words: tuple[str, ...] = ("base",)
    if kind == "directory":
        base.mkdir()
        words = ("directory",)
    elif kind == "fifo":
        os.mkfifo(base)
        words = ("FIFO",)
    elif kind == "link":
        base.symlink_to("/etc/passwd")
        words = ("/etc/passwd", "backing_dir")
    else:
        qemu.create(base, DISK_BYTES)
        Image(base).name_backing(b"bad.qed")
        words = ("loop",)
    refused(tmp_path, image.path, 17, words)


def test_a_source_of_a_wrong_kind_is_refused(tmp_path: Path) -> None:
    """A FIFO, a device and a missing file as SOURCE are named, without a hang."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    refused(tmp_path, fifo, 12, ("FIFO", "regular file"))
    refused(tmp_path, Path("/dev/zero"), 12, ("character device", "regular file"))
    refused(tmp_path, tmp_path / "missing.qed", 2, ("No such file",))


L1 = CLUSTER_BYTES
"""Where QEMU puts the L1 table, in bytes."""


def _l2(image: Image) -> int:
    return image.entry(L1, 0)


TABLES: Final[dict[str, Callable[[Image], None]]] = {
    "l1-unaligned": lambda image: image.put_entry(L1, 0, _l2(image) + 512),
    "l1-outside": lambda image: image.put_entry(L1, 0, 1 << 40),
    "l1-one": lambda image: image.put_entry(L1, 0, 1),
    "l1-overrun": lambda image: image.put_entry(
        L1, 0, image.path.stat().st_size // CLUSTER_BYTES * CLUSTER_BYTES - CLUSTER_BYTES
    ),
    "l1-itself": lambda image: image.put_entry(L1, 0, L1),
    "l2-unaligned": lambda image: image.put_entry(_l2(image), 0, image.entry(_l2(image), 0) + 8),
    "l2-outside": lambda image: image.put_entry(_l2(image), 0, 1 << 40),
    "l2-two": lambda image: image.put_entry(_l2(image), 0, 2),
    "l2-duplicate": lambda image: image.put_entry(_l2(image), 1, image.entry(_l2(image), 0)),
    "l2-over-l2": lambda image: image.put_entry(_l2(image), 1, _l2(image)),
    "l2-over-l1": lambda image: image.put_entry(_l2(image), 1, L1),
    "l2-over-header": lambda image: image.put_entry(_l2(image), 1, 0x1000),
    "cut-one-cluster": lambda image: os.truncate(
        image.path, image.path.stat().st_size - CLUSTER_BYTES - 100
    ),
}


@pytest.mark.parametrize("row", TABLES)
def test_bad_tables_refuse_a_writable_mount_of_an_image_that_needs_a_check(
    row: str, image: Image, tmp_path: Path
) -> None:
    """An unclean image with errors is refused unchanged, and the message says how to go on."""
    TABLES[row](image)
    image.put("features", 2)
    refused(tmp_path, image.path, 13, ("-o ro", "repair"))


def test_a_file_that_ends_within_a_cluster_is_checked(image: Image, tmp_path: Path) -> None:
    """A file that ends within a cluster is checked even if its header has no NEED_CHECK."""
    os.truncate(image.path, image.path.stat().st_size - 100)
    refused(tmp_path, image.path, 13, ("-o ro",))


@pytest.mark.parametrize("how", ["io-rw", "io-ro"])
def test_an_image_open_in_qemu_is_refused(how: str, image: Image, tmp_path: Path) -> None:
    """An image that QEMU has open is refused with a message that names QEMU."""
    with qemu.hold(image.path, read_only=how == "io-ro"):
        refused(tmp_path, image.path, 16, ("qemu-io",))


def test_hostile_tables_do_not_cost_memory(tmp_path: Path) -> None:
    """A sparse image that claims tables of 1 GiB is checked within the limit of address space."""
    path = tmp_path / "huge.qed"
    trio.run(lambda: create_image(str(path), 1 << 60, cluster_size=1 << 26, table_size=16))
    hostile = Image(path)
    hostile.put("features", 2)
    start = 2 << 30
    os.truncate(path, 64 << 30)
    for index in range(32):
        hostile.put_entry(1 << 26, index, start + (index << 30))
    hostile.put_entry(1 << 26, 33, 3)
    refused(tmp_path, path, 13, ("-o ro",))
