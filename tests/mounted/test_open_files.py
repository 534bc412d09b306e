"""Many images under a low limit on open files."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.mount.process.openfiles import MAX_OTHER_FILES
from tests.support import qemu
from tests.support.mounted import COMMAND, TIMEOUT, without_notice
from tests.support.programs import environment

if TYPE_CHECKING:
    from pathlib import Path

IMAGES: Final = 60
TOO_LOW_LIMIT: Final = IMAGES + MAX_OTHER_FILES - 1


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Give a directory of images."""
    directory = tmp_path / "images"
    directory.mkdir()
    first = qemu.create(directory / "0.qed", 1 << 20)
    for number in range(1, IMAGES):
        shutil.copyfile(first, directory / f"{number}.qed")
    return directory


def run(limit: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a shell with a limit on open files."""
    done = subprocess.run(
        ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash", *COMMAND, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment(),
        check=False,
    )
    done.stderr = without_notice(done.stderr)
    return done


def test_the_soft_limit_is_raised(images: Path, mnt: Path) -> None:
    """A soft limit that is too low is raised, as far as the hard limit allows."""
    done = run(f"-Sn {IMAGES // 2}", images, mnt)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(mnt.iterdir())) == IMAGES
    assert run("-Sn 32", "umount", mnt).returncode == 0


def test_a_hard_limit_that_is_too_low_is_reported(images: Path, mnt: Path) -> None:
    """A hard limit that is too low is one line, with the limit found and the limit needed."""
    done = run(f"-n {TOO_LOW_LIMIT}", images, mnt)
    assert done.returncode == 2
    assert done.stderr == (
        f"qedfuse: {IMAGES} images: found a limit of {TOO_LOW_LIMIT} open files, "
        f"expected {TOO_LOW_LIMIT + 1} (see: ulimit -Hn; for a service: LimitNOFILE=)\n"
    )


def test_backing_files_count_as_well(images: Path, tmp_path: Path, mnt: Path) -> None:
    """If backing files exceed the hard limit, one line says so; they are counted at opening."""
    overlays = tmp_path / "overlays"
    overlays.mkdir()
    base = images / "0.qed"
    first = qemu.create(overlays / "0.qed", 1 << 20, backing=base)
    for number in range(1, IMAGES):
        shutil.copyfile(first, overlays / f"{number}.qed")
    done = run(f"-n {TOO_LOW_LIMIT + 1}", overlays, mnt, "-o", f"backing_dir={images}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"Too many open files: found a limit of {TOO_LOW_LIMIT + 1} open files" in line
    assert f"expected more than {TOO_LOW_LIMIT + 1} for {IMAGES} images" in line


@pytest.mark.parametrize("limit", [6, 8])
def test_a_limit_that_is_too_low_for_the_program_is_no_bug(
    limit: int, tmp_path: Path, mnt: Path
) -> None:
    """A limit below what the program needs before it opens an image is one line as well."""
    image = qemu.create(tmp_path / "a.qed", 1 << 20)
    done = run(f"-n {limit}", "-r", image, mnt)
    assert done.returncode == 2
    assert done.stderr == (
        "qedfuse: open files: found no free descriptor, expected a higher limit "
        "(see: ulimit -n; for a service: LimitNOFILE=)\n"
    )
