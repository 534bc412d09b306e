"""Image locks of qedfuse and of QEMU exclude each other as they should."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest

import qedfuse
from qedfuse.disk.lookup import backing
from qedfuse.errors import ImageInUseError
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.ondisk.formats import is_qed
from tests.support import qemu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DISK_BYTES = 1 << 20

READERS: dict[str, Callable[[Path], object]] = {
    "qemu-io -r": lambda path: qemu.io(path, "read 0 512", read_only=True),
    "info": qemu.info,
    "check": qemu.check,
    "map": qemu.map_extents,
    "convert": qemu.content,
}
WRITERS: dict[str, Callable[[Path], object]] = {
    "qemu-io": lambda path: qemu.io(path, "read 0 512"),
    "check -r": partial(qemu.check, repair="all"),
    "resize": lambda path: qemu.run("qemu-img", "resize", "-f", "qed", path, str(2 * DISK_BYTES)),
    "rebase": lambda path: qemu.run("qemu-img", "rebase", "-f", "qed", "-u", "-b", "", path),
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Let QEMU create a small image."""
    return qemu.create(tmp_path / "image.qed", DISK_BYTES)


@contextmanager
def locked(path: Path, mode: LockMode) -> Iterator[None]:
    """Hold locks of qedfuse on a file inside the ``with`` block."""
    fd = os.open(path, os.O_RDONLY)
    try:
        lock_image(fd, mode, path.name)
        yield
    finally:
        os.close(fd)


def is_locked_out(use: Callable[[Path], object], path: Path) -> bool:
    """Return whether locks keep a QEMU tool from a file; other failures are raised."""
    try:
        use(path)
    except qemu.QemuError as error:
        assert "Failed to get" in str(error)  # noqa: PT017  any other failure is a bug
        return True
    return False


@pytest.mark.parametrize("tool", [*READERS, *WRITERS])
def test_our_writer_excludes_all(image: Path, tool: str) -> None:
    """A writer of qedfuse excludes readers and writers of QEMU."""
    with locked(image, LockMode.WRITE):
        assert is_locked_out({**READERS, **WRITERS}[tool], image)
    assert qemu.check(image).code == 0


def test_our_writer_allows_forced_readers(image: Path) -> None:
    """QEMU reads beside a writer of qedfuse with -U."""
    with locked(image, LockMode.WRITE):
        assert qemu.info(image, force_share=True)["virtual-size"] == DISK_BYTES
        assert "512/512" in qemu.io(image, "read 0 512", force_share=True)


@pytest.mark.parametrize("tool", READERS)
def test_our_reader_allows_readers(image: Path, tool: str) -> None:
    """A reader of qedfuse allows readers of QEMU."""
    with locked(image, LockMode.READ):
        assert not is_locked_out(READERS[tool], image)


@pytest.mark.parametrize("tool", WRITERS)
def test_our_reader_excludes_writers(image: Path, tool: str) -> None:
    """A reader of qedfuse excludes writers of QEMU."""
    with locked(image, LockMode.READ):
        assert is_locked_out(WRITERS[tool], image)


def test_our_sharing_reader_excludes_nothing(image: Path) -> None:
    """A reader of qedfuse that shares allows a writer of QEMU, in either order."""
    with locked(image, LockMode.SHARE):
        qemu.io(image, "write 0 512")
        with qemu.hold(image) as writer, locked(image, LockMode.SHARE):
            assert "512/512" in writer.command("write 0 512")


def test_raw_base_is_protected(tmp_path: Path) -> None:
    """A lock on a raw base excludes its writers, and QEMU may read the chain over it."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"\xaa" * DISK_BYTES)
    overlay = qemu.create(tmp_path / "overlay.qed", backing=base, backing_format="raw")
    with locked(base, LockMode.READ):
        assert qemu.content(overlay) == b"\xaa" * DISK_BYTES
        qemu.io(overlay, "write -P 1 0 512")
        write = partial(qemu.io, image_format="raw")
        assert is_locked_out(lambda path: write(path, "write 0 512"), base)
    write(base, "write 0 512")


def test_raw_base_in_use_by_qemu_s_chain(tmp_path: Path) -> None:
    """A raw base that QEMU reads below an overlay can be a base of qedfuse too."""
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(DISK_BYTES))
    overlay = qemu.create(tmp_path / "overlay.qed", backing=base, backing_format="raw")
    with qemu.hold(overlay), locked(base, LockMode.READ):
        pass


def test_a_base_is_locked_before_its_format_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base cannot get a header between the look at its format and the lock.

    Otherwise its header and tables would be shown as the content of a raw disk.
    """
    base = tmp_path / "base.img"
    base.write_bytes(b"\xaa" * DISK_BYTES)
    overlay = qemu.create(tmp_path / "overlay.qed", backing=base, backing_format="raw")
    # Without BACKING_FORMAT_NO_PROBE the format is read from the base.
    with overlay.open("r+b") as file:
        file.seek(16)
        file.write((1).to_bytes(8, "little"))
    attempts: list[bool] = []

    def attempt(start: bytes) -> bool:
        write = partial(qemu.io, image_format="raw")
        attempts.append(is_locked_out(lambda path: write(path, "write 0 512"), base))
        return is_qed(start)

    monkeypatch.setattr(backing, "is_qed", attempt)
    with qedfuse.open(overlay) as disk:
        assert disk.read(4) == b"\xaa" * 4
    assert attempts == [True]


@pytest.mark.parametrize("mode", [LockMode.WRITE, LockMode.READ])
def test_qemu_s_writer_excludes_us(image: Path, mode: LockMode) -> None:
    """An image that QEMU writes is refused with a message that names the process."""
    with qemu.hold(image) as writer:
        assert "512/512" in writer.command("read 0 512")
        with pytest.raises(ImageInUseError) as caught, locked(image, mode):
            pass
        message = str(caught.value)
        assert message.startswith("image.qed: in use: Failed to get ")
        assert message.endswith(f'"write" lock, held by qemu-io (pid {writer.pid})')
        assert "\n" not in message
        # The refused attempt leaves no lock behind.
        assert qemu.info(image, force_share=True)["format"] == "qed"
    with locked(image, mode):
        pass


@pytest.mark.parametrize("mode", LockMode)
def test_qemu_s_reader_excludes_only_our_writer(image: Path, mode: LockMode) -> None:
    """An image that QEMU reads can be read by qedfuse, but not written."""
    with qemu.hold(image, read_only=True) as reader:
        assert "512/512" in reader.command("read 0 512")
        if mode is LockMode.WRITE:
            held = rf'Failed to get "write" lock, held by qemu-io \(pid {reader.pid}\)$'
            with pytest.raises(ImageInUseError, match=held), locked(image, mode):
                pass
        else:
            with locked(image, mode):
                assert "512/512" in reader.command("read 0 512")


def test_qemu_s_forced_reader_excludes_nothing(image: Path) -> None:
    """A QEMU that reads with -U allows a writer of qedfuse."""
    with qemu.hold(image, force_share=True), locked(image, LockMode.WRITE):
        pass


@pytest.mark.parametrize("mode", LockMode)
def test_qed_base_of_qemu_s_chain(tmp_path: Path, mode: LockMode) -> None:
    """A QED base below an overlay that QEMU has open can be read by qedfuse, but not written."""
    base = qemu.create(tmp_path / "base.qed", DISK_BYTES)
    overlay = qemu.create(tmp_path / "overlay.qed", backing=base)
    with qemu.hold(overlay):
        if mode is LockMode.WRITE:
            with pytest.raises(ImageInUseError, match="qemu-io"), locked(base, mode):
                pass
        else:
            with locked(base, mode):
                pass


def test_two_readers_in_the_way_are_both_named(image: Path) -> None:
    """The error of a refused writer names each process that reads the image."""
    with qemu.hold(image, read_only=True) as one, qemu.hold(image, read_only=True) as two:
        with pytest.raises(ImageInUseError) as caught, locked(image, LockMode.WRITE):
            pass
        for reader in (one, two):
            assert f"qemu-io (pid {reader.pid})" in str(caught.value)
