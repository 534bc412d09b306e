"""A mount beside C extensions that were built from another version of the sources."""

from __future__ import annotations

import importlib
import signal
from typing import TYPE_CHECKING

from tests.support.disks import build_image, pattern
from tests.support.extensions import needs_extensions, outdated_extensions
from tests.support.mounted import front

if TYPE_CHECKING:
    from pathlib import Path


@needs_extensions
def test_a_mount_works_without_extensions_of_another_version(tmp_path: Path) -> None:
    """Reads and writes are right, and each extension has one line in the log."""
    prelude = outdated_extensions(tmp_path)
    image = tmp_path / "image.qed"
    image.write_bytes(build_image(1 << 20, {0: pattern(4096, 1)}))
    with front(image, tmp_path / "mnt", prelude=prelude) as mount:
        disk = mount.mountpoint / "image.raw"
        with disk.open("r+b") as file:
            assert file.read(4096) == pattern(4096, 1)
            file.seek(8192)
            file.write(pattern(4096, 2))
        assert disk.read_bytes()[8192:][:4096] == pattern(4096, 2)
        mount.signal(signal.SIGTERM)
        code, log = mount.finish()
    assert code == 0
    for name in ("hostio._iothreads", "mount.fuse._extraops", "mount.sandbox._threads"):
        path = f"{tmp_path}/qedfuse.{name}.so"
        lines = [line for line in log.splitlines() if path in line]
        assert len(lines) == 1, log
        expected = importlib.import_module(f"qedfuse.{name}").INTERFACE
        assert f"found interface 99, expected {expected}: " in lines[0]
