"""examples/quickstart.sh does the main job and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from qedfuse.mount.system.mounttable import read_mounts
from tests.support import qemu

ROOT: Final = Path(__file__).parents[2]
TIMEOUT: Final = 200.0

pytestmark = pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv",
    reason="the script would set up .venv first; tests/run.sh has done that",
)


def start(directory: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """Start the script with a directory for its temporary files."""
    return subprocess.Popen(
        [ROOT / "examples/quickstart.sh", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(directory)},
    )


def assert_nothing_left(directory: Path) -> None:
    """Assert that neither files nor mounts nor loop devices are left."""
    assert list(directory.iterdir()) == []
    assert not [mount for mount in read_mounts() if mount.path.startswith(str(directory))]
    loops = subprocess.run(["losetup", "--list"], capture_output=True, text=True, check=True)
    assert str(directory) not in loops.stdout


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Give an empty directory for temporary files."""
    path = tmp_path / "temporary"
    path.mkdir()
    return path


def test_without_arguments(directory: Path) -> None:
    """Without arguments the script does the main job, and its image is clean."""
    process = start(directory)
    shown, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, shown
    assert re.search(r"sample\.raw1 .* 512M 83 Linux", shown)
    assert "sound: errors: 0, leaked clusters: 0" in shown
    assert "NEED_CHECK is clear" in shown
    if os.getuid() == 0:
        assert "Hello from inside a QED image." in shown
    assert_nothing_left(directory)


def test_with_an_image(directory: Path, tmp_path: Path) -> None:
    """With an image the script shows its partitions and does not change it."""
    image = qemu.create(tmp_path / "an image.qed", 8 << 20)
    qemu.io(image, "write -P 0 510 1", "write -P 0x55 510 1", "write -P 0xaa 511 1")
    before = image.read_bytes()
    process = start(directory, image)
    shown, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, shown
    assert "an image.raw: 8 MiB" in shown
    assert "Disklabel type: dos" in shown
    assert image.read_bytes() == before
    assert_nothing_left(directory)


def test_with_a_file_that_is_no_image(directory: Path, tmp_path: Path) -> None:
    """With a file that is not an image the script prints qedfuse's line and exits with its code."""
    image = tmp_path / "no.qed"
    image.write_bytes(b"no image" * 100)
    process = start(directory, image)
    shown, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 12
    assert f"qedfuse: {image}: not a QED image" in shown
    assert_nothing_left(directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_cleans_up(directory: Path, number: signal.Signals) -> None:
    """A signal in the middle of the work removes all files, mounts and loop devices."""
    process = start(directory)
    assert process.stdout is not None
    for line in process.stdout:
        if "Partitioning" in line:
            process.send_signal(number)
            break
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number
    assert_nothing_left(directory)
