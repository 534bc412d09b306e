"""File objects of ``qedfuse.open`` and QEMU on the same images."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

import qedfuse
from qedfuse.errors import ImageInUseError
from tests.support import qemu

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES = 3 << 20


# QEMU creates images whose tables are one cluster long, but refuses to open them.
@pytest.mark.parametrize(("cluster_size", "table_size"), [(4096, 2), (65536, 4), (1 << 20, 16)])
def test_qemu_reads_what_a_program_wrote(
    tmp_path: Path, cluster_size: int, table_size: int
) -> None:
    """QEMU reads what a program wrote at random places of an overlay, and finds it clean."""
    rng = random.Random(cluster_size)
    model = bytearray(rng.randbytes(DISK_BYTES // 2)) + bytearray(DISK_BYTES // 2)
    base = tmp_path / "base.raw"
    base.write_bytes(model[: DISK_BYTES // 2])
    image = qemu.create(
        tmp_path / "image.qed",
        DISK_BYTES,
        cluster_size=cluster_size,
        table_size=table_size,
        backing=base,
        backing_format="raw",
    )
    with qedfuse.open(image, "r+b") as disk:
        for _ in range(50):
            start = rng.randrange(DISK_BYTES)
            data = rng.randbytes(rng.randrange(1, 20_000))[: DISK_BYTES - start]
            disk.seek(start)
            assert disk.write(data) == len(data)
            model[start : start + len(data)] = data
        disk.flush()
        disk.seek(0)
        assert disk.read() == model
    assert qemu.check(image).code == 0
    assert qemu.content(image) == model


def test_program_reads_what_qemu_wrote(tmp_path: Path) -> None:
    """A chain that QEMU made reads as QEMU reads it."""
    base = qemu.create(tmp_path / "base.qed", DISK_BYTES, cluster_size=4096)
    qemu.io(base, "write -P 1 0 100k", "write -P 2 1M 64k")
    overlay = qemu.create(tmp_path / "overlay.qed", backing=base)
    qemu.io(overlay, "write -P 3 50k 10k", "write -z 1M 64k", "write -P 4 2M 512")
    with qedfuse.open(overlay) as disk:
        assert disk.read() == qemu.content(overlay)


def test_locks_exclude_qemu_and_the_other_way_round(tmp_path: Path) -> None:
    """Each of both refuses an image that the other has open, and the error names the process."""
    image = qemu.create(tmp_path / "image.qed", DISK_BYTES)
    with qemu.hold(image) as holder, pytest.raises(ImageInUseError, match=f"pid {holder.pid}"):
        qedfuse.open(image)
    with qedfuse.open(image, "r+b"), pytest.raises(qemu.QemuError, match="Failed to get"):
        qemu.info(image)
    assert qemu.info(image)["virtual-size"] == DISK_BYTES
