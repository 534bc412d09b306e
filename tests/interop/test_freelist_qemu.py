"""The persistent free list with the real QEMU as the program that does not know it.

The review of the format asked: a newer program keeps a list, an older one changes the
image without knowing of it, the newer one comes back.  Each step here is either refused
or clean, and the content is compared each time.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.check.inspector import inspect_image as inspector
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.tools.editing import freelist
from qedfuse.tools.inspection import freelistinfo
from tests.support import qemu
from tests.support.disks import difference, guest_bytes, header_of, inspect_image
from tests.support.freelists import BIT, DESCRIPTOR, leaked_runs, listed, set_bit

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.disk.disk import Disk

KEEP: Final = OpenOptions(writable=True, compact="off")
ON: Final = OpenOptions(writable=True, free_list="on")
CLUSTER_BYTES: Final = 65536
DISK_BYTES: Final = 8 << 20
COMPAT: Final = 1 << 40 | 3
AUTOCLEAR: Final = 1 << 62 | 9

BITS = pytest.mark.parametrize(
    ("compat", "autoclear"),
    [(0, 0), (0, AUTOCLEAR), (COMPAT, 0), (COMPAT, AUTOCLEAR)],
    ids=["no other bits", "autoclear", "compat", "compat and autoclear"],
)


@dataclass
class Shared:
    """An image that both programs use alternately, and the expected content of its disk."""

    path: Path
    model: bytearray
    choice: random.Random
    compat: int = 0

    @property
    def file(self) -> bytearray:
        """The bytes of the image file."""
        return bytearray(self.path.read_bytes())

    def put_bits(self, compat: int, autoclear: int) -> None:
        """Set bits that neither program knows."""
        content = self.file
        struct.pack_into("<QQ", content, 24, compat, autoclear)
        self.path.write_bytes(content)
        self.compat = compat

    def ranges(self, count: int) -> list[tuple[int, int, int]]:
        """Choose sectors to change: start and length in bytes, and a byte to write."""
        starts = [self.choice.randrange(DISK_BYTES // 512 - 300) * 512 for _ in range(count)]
        return [(at, self.choice.choice((512, CLUSTER_BYTES, 100_352)), n % 250 + 1)
                for n, at in enumerate(starts)]  # fmt: skip

    def qemu_commands(self, count: int) -> list[str]:
        """Choose writes for QEMU, and apply them to the model."""
        commands = []
        for start, length, byte in self.ranges(count):
            commands.append(f"write -P {byte} {start} {length}")
            self.model[start : start + length] = bytes([byte]) * length
        return commands

    def qemu_crashes(self) -> None:
        """Kill QEMU after a flush, while clusters are allocated that no table refers to."""
        empty = [n * CLUSTER_BYTES for n in range(DISK_BYTES // CLUSTER_BYTES)
                 if not any(self.model[n * CLUSTER_BYTES : (n + 1) * CLUSTER_BYTES])]  # fmt: skip
        with qemu.hold(f"blkdebug::{self.path}") as held:
            for words in (*self.qemu_commands(2), "flush", "break l2_update stop"):
                held.command(words)
            # Zeros, so that the content is the same whether the write is lost or not.
            held.command(f"aio_write -P 0 {empty[-1]} {CLUSTER_BYTES}")
            held.command("wait_break stop")
            os.kill(held.pid, signal.SIGKILL)

    async def change(self, disk: Disk, *, discards: int = 6) -> None:
        """Write and discard through qedfuse."""
        for start, length, byte in self.ranges(4):
            await disk.write(start, bytes([byte]) * length)
            self.model[start : start + length] = bytes([byte]) * length
        used = [
            n
            for n in range(DISK_BYTES // CLUSTER_BYTES)
            if any(self.model[n * CLUSTER_BYTES :][:CLUSTER_BYTES])
        ]
        for number in self.choice.sample(used, discards):
            start = number * CLUSTER_BYTES
            await disk.discard(start, CLUSTER_BYTES)
            self.model[start : start + CLUSTER_BYTES] = bytes(CLUSTER_BYTES)

    async def change_cleanly(self, options: OpenOptions, **given: int) -> None:
        """Open the image with qedfuse, change it, and close it cleanly."""
        async with open_disk(str(self.path), options, inspector=inspector) as disk:
            await self.change(disk, **given)

    async def drain(self) -> None:
        """Allocate all free clusters, so that there is nothing to list."""
        async with open_disk(str(self.path), KEEP, inspector=inspector) as disk:
            await disk.ensure_scanned()
            while disk.statistics().free_clusters:
                for number in range(DISK_BYTES // CLUSTER_BYTES):
                    if not disk.statistics().free_clusters:
                        break
                    await disk.allocate(number * CLUSTER_BYTES, CLUSTER_BYTES)

    async def compare(self) -> None:
        """Compare the content, as qedfuse reads it and as the file's tables map it."""
        async with open_disk(str(self.path)) as disk:
            assert difference(await disk.read(0, disk.size), self.model) is None
        assert difference(guest_bytes(self.file), self.model) is None
        found = inspect_image(self.file)
        assert found.errors == ()
        assert header_of(self.file).compat_features == self.compat

    async def assert_refused(self) -> None:
        """Assert that QEMU refuses to open the image, names the bit, and changes nothing."""
        before = self.file
        runs = listed(before)
        assert runs == leaked_runs(before)
        assert runs
        for command in (
            ("qemu-img", "info", self.path),
            ("qemu-img", "check", "-r", "all", self.path),
            ("qemu-img", "convert", "-O", "raw", self.path, f"{self.path}.raw"),
            ("qemu-img", "resize", "-f", "qed", self.path, "16M"),
            ("qemu-io", "-f", "qed", "-c", "write 0 64k", self.path),
            ("qemu-io", "-f", "qed", "-r", "-c", "read 0 64k", self.path),
        ):
            done = qemu.run(*command, codes=(1,))
            assert f"Unsupported QED features: {BIT:x}" in done.stdout + done.stderr
        assert self.file == before
        await self.compare()

    async def assert_accepted(self, *, leaks: bool) -> None:
        """Assert that QEMU opens the image and finds nothing worse than leaks."""
        assert listed(self.file) is None
        found = qemu.check(self.path)
        assert found.code in ((0, 3) if leaks else (0,))
        assert not found.errors
        assert difference(qemu.content(self.path), self.model) is None
        await self.compare()


async def begin(path: Path, compat: int, autoclear: int) -> Shared:
    """Let QEMU create an image and qedfuse add a list to it."""
    shared = Shared(path, bytearray(DISK_BYTES), random.Random(f"{compat} {autoclear}"))
    qemu.create(path, DISK_BYTES)
    qemu.io(path, *shared.qemu_commands(12))
    shared.put_bits(compat, autoclear)
    await shared.change_cleanly(ON)
    assert header_of(shared.file).autoclear_features == 0
    # Set again, as by the program that the bits belong to.
    shared.put_bits(compat, autoclear)
    await shared.assert_refused()
    return shared


@BITS
@pytest.mark.expect_log("leaked clusters found by the check")
async def test_alternating_with_qemu(tmp_path: Path, compat: int, autoclear: int) -> None:
    """QEMU works on the image when the list is drained or dropped, and qedfuse can list again."""
    shared = await begin(tmp_path / "shared.qed", compat, autoclear)
    for cycle in range(3):
        if cycle:
            await freelist.drop(str(shared.path))
        else:
            await shared.drain()
        assert not any(shared.file[DESCRIPTOR : DESCRIPTOR + 512])
        await shared.assert_accepted(leaks=cycle > 0)
        shared.put_bits(compat, autoclear)
        qemu.io(shared.path, *shared.qemu_commands(5))
        assert header_of(shared.file).autoclear_features == 0
        await shared.assert_accepted(leaks=True)

        shared.qemu_crashes()
        assert header_of(shared.file).need_check
        assert inspect_image(shared.file).leaks
        # Without a list at the opening, none is written by default.
        await shared.change_cleanly(KEEP, discards=0)
        assert listed(shared.file) is None
        await shared.change_cleanly(ON)
        await shared.assert_refused()
        await shared.change_cleanly(KEEP)
        await shared.assert_refused()


@BITS
async def test_a_crash_while_a_list_is_kept(tmp_path: Path, compat: int, autoclear: int) -> None:
    """A crash of qedfuse leaves the feature bit clear: QEMU opens the image and finds leaks."""
    shared = await begin(tmp_path / "shared.qed", compat, autoclear)
    crashed = tmp_path / "crashed.qed"
    async with open_disk(str(shared.path), KEEP) as disk:
        await shared.change(disk)
        await disk.flush()
        # The file is copied in the state that a kill leaves.
        shutil.copy(shared.path, crashed)
    await shared.assert_refused()

    after = Shared(crashed, shared.model, shared.choice, compat)
    assert header_of(after.file).need_check
    # QEMU checks and repairs the image when it opens it.
    qemu.io(crashed, *after.qemu_commands(5))
    await after.assert_accepted(leaks=True)
    await after.change_cleanly(ON)
    await after.assert_refused()


async def test_a_crash_before_the_first_change_leaves_the_list(tmp_path: Path) -> None:
    """A crash before the first change leaves a valid list, and QEMU refuses the image."""
    shared = await begin(tmp_path / "shared.qed", 0, 0)
    crashed = tmp_path / "crashed.qed"
    async with open_disk(str(shared.path), KEEP) as disk:
        await disk.read(0, DISK_BYTES)
        await disk.flush()
        shutil.copy(shared.path, crashed)
    assert crashed.read_bytes() == shared.path.read_bytes()
    await Shared(crashed, shared.model, shared.choice).assert_refused()


@pytest.mark.expect_log("free list: descriptor file_bytes: found")
async def test_a_stale_list_is_rejected_by_the_file_length(tmp_path: Path) -> None:
    """A list that another program hid and restored is rejected by the length of the file."""
    shared = await begin(tmp_path / "shared.qed", 0, 0)
    content = shared.file
    set_bit(content, value=False)
    shared.path.write_bytes(content)
    qemu.io(shared.path, *shared.qemu_commands(20))
    content = shared.file
    set_bit(content)
    shared.path.write_bytes(content)
    info = await freelistinfo.describe_free_list(str(shared.path))
    assert (info.present, info.valid) == (True, False)
    await shared.change_cleanly(KEEP)
    await shared.assert_refused()


async def test_an_image_with_a_list_as_a_base(tmp_path: Path) -> None:
    """An overlay of it is readable by qedfuse, and by QEMU once the list is dropped."""
    shared = await begin(tmp_path / "base.qed", 0, 0)
    overlay = tmp_path / "overlay.qed"
    plain = tmp_path / "plain.qed"
    shutil.copy(shared.path, plain)
    await freelist.drop(str(plain))
    qemu.create(overlay, backing=plain)
    shared.path.replace(plain)
    shared.path = plain
    before = shared.file
    async with open_disk(str(overlay), KEEP) as disk:
        assert difference(await disk.read(0, disk.size), shared.model) is None
        await disk.write(0, b"\1" * 512)
    assert shared.file == before
    words = ("qemu-io", "-f", "qed", "-c", "read 0 512", overlay)
    assert f"{BIT:x}" in qemu.run(*words, codes=(1,)).stderr
    await freelist.drop(str(plain))
    shared.model[:512] = b"\1" * 512
    assert difference(qemu.content(overlay), shared.model) is None


async def test_show_enable_drop(tmp_path: Path) -> None:
    """The functions of ``qedimg freelist`` show, enable and drop a list."""
    path = tmp_path / "image.qed"
    qemu.create(path, DISK_BYTES)
    qemu.io(path, "write -P 1 0 1M")
    assert await freelistinfo.describe_free_list(str(path)) == freelistinfo.FreeListInfo(
        present=False
    )
    assert not (await freelist.enable(str(path))).present
    async with open_disk(str(path), KEEP) as disk:
        await disk.discard(0, 3 * CLUSTER_BYTES)
        await disk.discard(5 * CLUSTER_BYTES, CLUSTER_BYTES)
    found = await freelist.enable(str(path))
    assert found == freelistinfo.FreeListInfo(
        present=True, valid=True, runs=2, clusters=4, bytes=4 * CLUSTER_BYTES, list_clusters=1
    )
    assert await freelist.enable(str(path)) == found
    await freelist.drop(str(path))
    assert await freelistinfo.describe_free_list(str(path)) == freelistinfo.FreeListInfo(
        present=False
    )
    assert qemu.check(path).leaks == 4
