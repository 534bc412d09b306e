"""The backup that a repair saves beside the image: who may read it, and that it is durable."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.tools.repair import backup as module
from tests.support.disks import build_image, l2_entry_offset, pattern, put_entry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qedfuse.hostio.hostfile import Buffer

CLUSTER_BYTES = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give an image with a bad entry."""
    content = build_image(
        64 * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(5)}, table_size=2
    )
    put_entry(content, l2_entry_offset(content, 2), 1 << 40)
    image = tmp_path / "image.qed"
    image.write_bytes(content)
    return image


@pytest.fixture
def without_umask() -> Iterator[None]:
    """Set the umask to 0, so that only the program restricts the mode of new files."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("without_umask")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_the_backup_has_the_mode_of_the_image(
    mode: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backup is created with mode 0600 and then gets the image's mode and owner."""
    path.chmod(mode)
    first: list[int] = []
    real = module.copy_owner_and_mode

    def like(fd: int, image: os.stat_result) -> None:
        first.append(os.fstat(fd).st_mode & 0o777)
        real(fd, image)

    monkeypatch.setattr(module, "copy_owner_and_mode", like)
    assert main(["check", "-q", "-r", "all", str(path)]) in (0, 3)
    found = path.with_name("image.qed.before-repair").stat()
    assert found.st_mode & 0o7777 == mode
    assert (found.st_uid, found.st_gid) == (path.stat().st_uid, path.stat().st_gid)
    assert first == [0o600]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL])
def test_the_group_gets_no_access_if_it_cannot_be_set(
    number: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the owner cannot be set, the group's permission bits are cleared: the group is another."""
    made = path.with_name("made")
    path.chmod(0o660)

    def refuse(_fd: int, _uid: int, _gid: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fchown", refuse)
    stat = path.stat()
    other = os.stat_result((*stat[:5], stat.st_gid + 1, *stat[6:]))
    with made.open("wb") as file:
        module.copy_owner_and_mode(file.fileno(), other)
    assert made.stat().st_mode & 0o777 == 0o600


def test_a_symbolic_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    """A symbolic link in the backup's place is a name that is taken."""
    target = tmp_path / "elsewhere"
    path.with_name("image.qed.before-repair").symlink_to(target)
    assert main(["check", "-q", "-r", "all", str(path)]) in (0, 3)
    assert not target.exists()
    assert path.with_name("image.qed.before-repair.2").stat().st_size


def test_the_name_of_the_backup_is_durable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the backup and its directory are synced."""
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115  a name
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    assert main(["check", "-q", "-r", "all", str(path)]) in (0, 3)
    assert str(path.parent) in synced
    assert f"{path}.before-repair" in synced


def test_without_a_backup_nothing_is_changed(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the backup cannot be created, one line says so and the image does not change."""
    long = path.rename(tmp_path / f"{'x' * 245}.qed")
    before = long.read_bytes()
    assert main(["check", "-r", "all", str(long)]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    expected = "cannot create the backup (repair a copy of the image elsewhere): File name too long"
    assert expected in said.err
    assert long.read_bytes() == before
    assert list(tmp_path.iterdir()) == [long]


@pytest.mark.parametrize("action", ["write", "fsync"])
def test_a_backup_that_fails_half_way_is_removed(
    action: str, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup whose write or fsync fails is removed, and the image does not change."""
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    if action == "write":
        monkeypatch.setattr(module, "copy_owner_and_mode", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    assert main(["check", "-q", "-r", "all", str(path)]) == 1
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_backup_is_complete_before_the_first_change(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first write to the image the backup is complete and durable, and so is its name."""
    backup = path.with_name("image.qed.before-repair")
    synced: list[str] = []
    seen: list[tuple[bytes, list[str]]] = []
    real_fsync, real_pwrite = os.fsync, PosixFile.pwrite

    def fsync(fd: int) -> None:
        real_fsync(fd)
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115  a name

    async def pwrite(self: PosixFile, offset: int, *parts: Buffer) -> None:
        seen.append((backup.read_bytes(), synced.copy()))
        await real_pwrite(self, offset, *parts)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(PosixFile, "pwrite", pwrite)
    assert main(["check", "-q", "-r", "all", str(path)]) in (0, 3)
    found, durable = seen[0]
    assert found == backup.read_bytes()
    assert found.splitlines()[-1].startswith(b"complete 2 ")
    assert durable == [str(backup), str(path.parent)]
