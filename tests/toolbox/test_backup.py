"""What a repair saves beside the image: who may read it, and that it is there for good."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.tools import backup as module
from tests.support.disks import build_image, l2_entry_offset, pattern, put_entry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLUSTER = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give an image with a wild entry."""
    content = build_image(64 * CLUSTER, {n: pattern(CLUSTER, n) for n in range(5)}, table_size=2)
    put_entry(content, l2_entry_offset(content, 2), 1 << 40)
    image = tmp_path / "image.qed"
    image.write_bytes(content)
    return image


@pytest.fixture
def loose() -> Iterator[None]:
    """Forbid nothing in the modes of new files."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_who_may_not_read_the_image_may_not_read_the_backup(
    mode: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the image's mode and owner, and less at the moment in which it is made."""
    path.chmod(mode)
    first: list[int] = []
    real = module.like

    def like(fd: int, image: os.stat_result) -> None:
        first.append(os.fstat(fd).st_mode & 0o777)
        real(fd, image)

    monkeypatch.setattr(module, "like", like)
    assert main(["check", "-q", "-r", "all", str(path)]) in (0, 3)
    found = path.with_name("image.qed.before-repair").stat()
    assert found.st_mode & 0o7777 == mode
    assert (found.st_uid, found.st_gid) == (path.stat().st_uid, path.stat().st_gid)
    assert first == [0o600]


def test_a_group_that_it_cannot_have_gets_no_access(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the owner cannot be set, the group's bits would be for another group."""
    made = path.with_name("made")
    path.chmod(0o660)

    def refuse(_fd: int, _uid: int, _gid: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    stat = path.stat()
    other = os.stat_result((*stat[:5], stat.st_gid + 1, *stat[6:]))
    with made.open("wb") as file:
        module.like(file.fileno(), other)
    assert made.stat().st_mode & 0o777 == 0o600


def test_a_name_that_leads_elsewhere_is_not_followed(path: Path, tmp_path: Path) -> None:
    """A symbolic link in the backup's place is a name that is taken."""
    target = tmp_path / "elsewhere"
    path.with_name("image.qed.before-repair").symlink_to(target)
    assert main(["check", "-q", "-r", "all", str(path)]) in (0, 3)
    assert not target.exists()
    assert path.with_name("image.qed.before-repair.2").stat().st_size


def test_its_name_is_durable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the file and its directory are synced."""
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115  a name
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert main(["check", "-q", "-r", "all", str(path)]) in (0, 3)
    assert str(path.parent) in synced
    assert f"{path}.before-repair" in synced
