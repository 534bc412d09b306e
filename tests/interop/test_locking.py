"""Our locks and QEMU's: neither program opens what the other must have for itself."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest

from qedfuse.errors import ImageInUseError
from qedfuse.hostio.locking import LockMode, lock_image
from tests.support import qemu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE = 1 << 20

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
    "resize": lambda path: qemu.run("qemu-img", "resize", "-f", "qed", path, str(2 * SIZE)),
    "rebase": lambda path: qemu.run("qemu-img", "rebase", "-f", "qed", "-u", "-b", "", path),
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Have QEMU make a small image."""
    return qemu.create(tmp_path / "image.qed", SIZE)


@contextmanager
def locked(path: Path, mode: LockMode) -> Iterator[None]:
    """Hold our locks on a file inside the ``with`` block."""
    fd = os.open(path, os.O_RDONLY)
    try:
        lock_image(fd, mode, path.name)
        yield
    finally:
        os.close(fd)


def stopped(use: Callable[[Path], object], path: Path) -> bool:
    """Tell whether the locks keep a QEMU tool from a file; other failures are not hidden."""
    try:
        use(path)
    except qemu.QemuError as error:
        assert "Failed to get" in str(error)  # noqa: PT017  any other failure is a bug
        return True
    return False


@pytest.mark.parametrize("tool", [*READERS, *WRITERS])
def test_our_writer_stops_everybody(image: Path, tool: str) -> None:
    """While we write, QEMU opens the image neither for reading nor for writing."""
    with locked(image, LockMode.WRITE):
        assert stopped({**READERS, **WRITERS}[tool], image)
    assert qemu.check(image).code == 0


def test_our_writer_lets_forced_readers_in(image: Path) -> None:
    """Whoever says -U reads beside us."""
    with locked(image, LockMode.WRITE):
        assert qemu.info(image, force_share=True)["virtual-size"] == SIZE
        assert "512/512" in qemu.io(image, "read 0 512", force_share=True)


@pytest.mark.parametrize("tool", READERS)
def test_our_reader_lets_readers_in(image: Path, tool: str) -> None:
    """While we read, QEMU may read."""
    with locked(image, LockMode.READ):
        assert not stopped(READERS[tool], image)


@pytest.mark.parametrize("tool", WRITERS)
def test_our_reader_stops_writers(image: Path, tool: str) -> None:
    """While we read, QEMU may not write."""
    with locked(image, LockMode.READ):
        assert stopped(WRITERS[tool], image)


def test_our_shared_reader_stops_nobody(image: Path) -> None:
    """A reader that shares lets QEMU write, whoever comes first."""
    with locked(image, LockMode.SHARE):
        qemu.io(image, "write 0 512")
        with qemu.hold(image) as writer, locked(image, LockMode.SHARE):
            assert "512/512" in writer.command("write 0 512")


def test_raw_base_is_protected(tmp_path: Path) -> None:
    """Our lock on a raw base stops its writers, and lets QEMU read the chain over it."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"\xaa" * SIZE)
    overlay = qemu.create(tmp_path / "overlay.qed", backing=base, backing_format="raw")
    with locked(base, LockMode.BASE):
        assert qemu.content(overlay) == b"\xaa" * SIZE
        qemu.io(overlay, "write -P 1 0 512")
        write = partial(qemu.io, image_format="raw")
        assert stopped(lambda path: write(path, "write 0 512"), base)
    write(base, "write 0 512")


def test_raw_base_in_use_by_qemu_s_chain(tmp_path: Path) -> None:
    """A base that QEMU reads beneath an overlay can be our base too."""
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(SIZE))
    overlay = qemu.create(tmp_path / "overlay.qed", backing=base, backing_format="raw")
    with qemu.hold(overlay), locked(base, LockMode.BASE):
        pass


@pytest.mark.parametrize("mode", [LockMode.WRITE, LockMode.READ, LockMode.BASE])
def test_qemu_s_writer_stops_us(image: Path, mode: LockMode) -> None:
    """An image that QEMU writes is refused, and the message says who has it."""
    with qemu.hold(image) as writer:
        assert "512/512" in writer.command("read 0 512")
        with pytest.raises(ImageInUseError) as caught, locked(image, mode):
            pass
        message = str(caught.value)
        assert message.startswith("image.qed: in use: Failed to get ")
        assert message.endswith(f'"write" lock, held by qemu-io (pid {writer.pid})')
        assert "\n" not in message
        # The refused attempt has left nothing behind that would disturb others.
        assert qemu.info(image, force_share=True)["format"] == "qed"
    with locked(image, mode):
        pass


@pytest.mark.parametrize("mode", LockMode)
def test_qemu_s_reader_stops_only_our_writer(image: Path, mode: LockMode) -> None:
    """An image that QEMU reads can be read, but not written."""
    with qemu.hold(image, read_only=True) as reader:
        assert "512/512" in reader.command("read 0 512")
        if mode is LockMode.WRITE:
            held = rf'Failed to get "write" lock, held by qemu-io \(pid {reader.pid}\)$'
            with pytest.raises(ImageInUseError, match=held), locked(image, mode):
                pass
        else:
            with locked(image, mode):
                assert "512/512" in reader.command("read 0 512")


def test_qemu_s_forced_reader_stops_nobody(image: Path) -> None:
    """A QEMU that reads with -U lets us write."""
    with qemu.hold(image, force_share=True), locked(image, LockMode.WRITE):
        pass


@pytest.mark.parametrize("mode", LockMode)
def test_qed_base_of_qemu_s_chain(tmp_path: Path, mode: LockMode) -> None:
    """A QED base beneath an overlay that QEMU has open can be read, but not written."""
    base = qemu.create(tmp_path / "base.qed", SIZE)
    overlay = qemu.create(tmp_path / "overlay.qed", backing=base)
    with qemu.hold(overlay):
        if mode is LockMode.WRITE:
            with pytest.raises(ImageInUseError, match="qemu-io"), locked(base, mode):
                pass
        else:
            with locked(base, mode):
                pass


def test_two_readers_in_the_way_are_both_named(image: Path) -> None:
    """Everybody who holds the image is named."""
    with qemu.hold(image, read_only=True) as one, qemu.hold(image, read_only=True) as two:
        with pytest.raises(ImageInUseError) as caught, locked(image, LockMode.WRITE):
            pass
        for reader in (one, two):
            assert f"qemu-io (pid {reader.pid})" in str(caught.value)
