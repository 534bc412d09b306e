"""New files get their name when they are complete, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.cli.qedimg.main import main
from qedfuse.errors import HostError, ImageInUseError, UsageError
from qedfuse.hostio.newfile import NewFile
from qedfuse.hostio.replacedfile import lock_replaced_file
from qedfuse.mount.system.boundedcall import call_in_child
from qedfuse.tools.copying.convert import convert
from qedfuse.tools.editing.create import create
from tests.support import qemu
from tests.support.users import USER_ID

if TYPE_CHECKING:
    from collections.abc import Callable


def names(directory: Path) -> set[str]:
    """List a directory, hidden files included."""
    return set(os.listdir(directory))  # noqa: PTH208  names, not paths


def without_links(*_: object) -> None:
    """Refuse hard links, as FAT does."""
    raise OSError(errno.EPERM, "no links here")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(
    *, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that appears under the name meanwhile is kept, also on hosts without hard links."""
    if not links:
        monkeypatch.setattr(os, "link", without_links)
    with NewFile(str(tmp_path / "a")) as new:
        (tmp_path / "a").write_bytes(b"theirs")
        with pytest.raises(UsageError, match="a: exists already"):
            new.commit()
    assert (tmp_path / "a").read_bytes() == b"theirs"
    with NewFile(str(tmp_path / "b")) as new:
        with open(new.path, "wb") as file:  # noqa: PTH123  a name, not a Path
            file.write(b"ours")
        new.commit()
    assert (tmp_path / "b").read_bytes() == b"ours"
    assert names(tmp_path) == {"a", "b"}


def test_a_failed_rename_leaves_no_empty_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host without hard links, the file that reserves the name goes if the rename fails."""
    monkeypatch.setattr(os, "link", without_links)

    def fail(*_: object) -> None:
        assert names(tmp_path) == {"a", os.path.basename(new.path)}  # noqa: PTH119
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with NewFile(str(tmp_path / "a")) as new:
        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(HostError, match="Input/output error"):
            new.commit()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("command", ["create", "convert"])
@pytest.mark.parametrize("at_start", ["nothing", "a file", "a link"])
def test_force_replaces_only_what_was_there_at_the_start(
    *, at_start: str, command: str, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --force a file that appeared meanwhile is kept, because it was never locked."""
    if not links:
        monkeypatch.setattr(os, "link", without_links)
    raw, path, theirs = tmp_path / "raw", tmp_path / "a.qed", tmp_path / "theirs"
    target = tmp_path / "place.qed" if at_start == "a link" else path
    raw.write_bytes(b"x" * 512)
    theirs.write_bytes(b"theirs")
    if at_start != "nothing":
        target.write_bytes(b"old")
    if at_start == "a link":
        path.symlink_to("place.qed")
    moves: list[Path] = []

    def meanwhile(*_: object) -> None:
        if not moves:
            moves.append(theirs.rename(target))

    make: dict[str, Callable[[], object]] = {
        "create": partial(create, str(path), 1 << 20, overwrite=True, fill=meanwhile),
        "convert": partial(
            trio.run, partial(convert, str(raw), str(path), overwrite=True, progress=meanwhile)
        ),
    }
    with pytest.raises(ImageInUseError, match="qed: not replaced: another process has") as caught:
        make[command]()
    assert "\n" not in str(caught.value)
    assert moves
    assert target.read_bytes() == b"theirs"
    assert names(tmp_path) == {"raw", "a.qed", target.name}


@pytest.mark.parametrize("command", ["create", "convert"])
def test_a_temporary_file_that_another_program_removes(command: str, tmp_path: Path) -> None:
    """If the temporary file is removed meanwhile, the error says so, and no file is left."""
    raw, path = tmp_path / "raw", tmp_path / "a.qed"
    raw.write_bytes(b"x" * 512)

    def meanwhile(*_: object) -> None:
        for part in tmp_path.glob(".*.part"):
            part.unlink()

    make: dict[str, Callable[[], object]] = {
        "create": partial(create, str(path), 1 << 20, fill=meanwhile),
        "convert": partial(trio.run, partial(convert, str(raw), str(path), progress=meanwhile)),
    }
    with pytest.raises(HostError) as caught:
        make[command]()
    assert str(caught.value) == (
        f"{path}: cannot make: another program has removed the temporary file"
    )
    assert names(tmp_path) == {"raw"}


@pytest.mark.parametrize("kind", [KeyboardInterrupt, UsageError, trio.Cancelled])
def test_the_error_of_the_block_is_not_replaced(kind: type[BaseException], tmp_path: Path) -> None:
    """An interrupt, an error or a cancellation is kept if the temporary file cannot be removed."""
    ended = False

    async def cancelled() -> None:
        with trio.CancelScope() as scope, NewFile(str(tmp_path / "a")) as new:
            os.unlink(new.path)  # noqa: PTH108  a name, not a Path
            scope.cancel()
            await trio.sleep_forever()
        nonlocal ended
        ended = scope.cancelled_caught

    def failing() -> None:
        with NewFile(str(tmp_path / "a")) as new:
            os.unlink(new.path)  # noqa: PTH108  a name, not a Path
            raise kind

    if kind is trio.Cancelled:
        trio.run(cancelled)
        assert ended
    else:
        with pytest.raises(kind):
            failing()
    assert names(tmp_path) == set()


def test_a_temporary_name_that_is_removed_after_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that has its final name is complete, even if its temporary name is gone."""
    link = os.link

    def link_and_remove(old: str, new: str) -> None:
        link(old, new)
        os.unlink(old)  # noqa: PTH108  a name, not a Path

    monkeypatch.setattr(os, "link", link_and_remove)
    with NewFile(str(tmp_path / "a")) as new:
        new.commit()
    assert names(tmp_path) == {"a"}


def test_force_where_the_old_file_is_removed_meanwhile(tmp_path: Path) -> None:
    """If the old file is removed meanwhile, the new one takes its name and permissions."""
    path = tmp_path / "a.qed"
    path.write_bytes(b"old")
    path.chmod(0o640)
    create(str(path), 1 << 20, overwrite=True, fill=lambda _name: path.unlink())
    assert qemu.check(path).code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(tmp_path) == {"a.qed"}


@pytest.mark.parametrize("name", ["x" * 255, "\N{EURO SIGN}" * 85], ids=["ascii", "euro"])
@pytest.mark.parametrize(
    "words", ["create IMAGE 1M", "convert RAW IMAGE", "convert -O qcow2 RAW IMAGE"]
)
def test_names_of_maximal_length(name: str, words: str, tmp_path: Path) -> None:
    """A name as long as the host allows works: the temporary name is not longer."""
    (tmp_path / "raw").write_bytes(b"x" * 512)
    paths = {"IMAGE": str(tmp_path / name), "RAW": str(tmp_path / "raw")}
    assert main([paths.get(word, word) for word in [*words.split(), "-q"]]) == 0
    assert names(tmp_path) == {name, "raw"}


def test_the_target_of_a_link_is_replaced(tmp_path: Path) -> None:
    """With --force the target of a symbolic link is replaced, and the link stays."""
    directory = tmp_path / "place"
    directory.mkdir()
    old, link = directory / "old.qed", tmp_path / "link.qed"
    old.write_bytes(b"old")
    link.symlink_to("place/old.qed")
    assert main(["create", "-q", str(link), "1M"]) == 1
    assert old.read_bytes() == b"old"
    assert main(["create", "-q", "--force", str(link), "1M"]) == 0
    assert link.is_symlink()
    assert qemu.check(old).code == 0
    assert names(directory) == {"old.qed"}
    assert names(tmp_path) == {"link.qed", "place"}


def test_owner_and_mode_of_the_replaced_file_are_kept(tmp_path: Path) -> None:
    """Owner, mode and attributes are kept, and the temporary file has mode 0600."""
    path = tmp_path / "a.qed"
    path.write_bytes(b"old")
    os.chown(path, 1234, 2345)
    path.chmod(0o640)
    os.setxattr(path, "user.comment", b"mine")
    with ExitStack() as stack:
        old = lock_replaced_file(str(path), stack, overwrite=True)
        new = stack.enter_context(NewFile(str(path), old=old, overwrite=True))
        assert stat.S_IMODE(os.stat(new.path).st_mode) == 0o600  # noqa: PTH116  a name
        new.commit()
    info = path.stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (1234, 2345, 0o640)
    assert os.getxattr(path, "user.comment") == b"mine"
    assert path.read_bytes() == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
@pytest.mark.parametrize(
    ("owner", "mode"), [(1234, 0o040), (USER_ID, 0o440)], ids=["through-the-group", "read-only"]
)
def test_a_mode_that_permits_less_than_the_work_on_the_file(owner: int, mode: int) -> None:
    """A user's new file gets mode and attributes, although the mode forbids reads or writes."""
    with TemporaryDirectory(dir="/var/tmp") as name:  # the user may not search tmp_path
        path = Path(name) / "a.qed"
        path.write_bytes(b"old")
        os.setxattr(path, "user.comment", b"mine")
        os.chown(name, USER_ID, USER_ID)
        os.chown(path, owner, USER_ID)
        path.chmod(mode)

        def create_as_user() -> bool:
            os.setgroups([])
            os.setresgid(USER_ID, USER_ID, USER_ID)
            os.setresuid(USER_ID, USER_ID, USER_ID)  # drops all capabilities
            create(str(path), 1 << 20, overwrite=True)
            return os.access(path, os.R_OK)

        assert call_in_child(create_as_user, 60) is (mode != 0o040)
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (USER_ID, USER_ID)
        assert stat.S_IMODE(status.st_mode) == mode
        assert os.getxattr(path, "user.comment") == b"mine"
        assert names(Path(name)) == {"a.qed"}
        assert qemu.check(path).code == 0


def test_access_control_lists_of_the_replaced_file_are_kept(tmp_path: Path) -> None:
    """The list, and the mode that includes its mask, are those of the replaced file."""
    path = tmp_path / "a.qed"
    path.write_bytes(b"old")
    path.chmod(0o2750)
    subprocess.run(["setfacl", "-m", "u:1234:rw,m::rx", path], check=True)
    before = os.getxattr(path, "system.posix_acl_access"), path.stat().st_mode
    create(str(path), 1 << 20, overwrite=True)
    assert path.stat().st_size > len(b"old")
    assert (os.getxattr(path, "system.posix_acl_access"), path.stat().st_mode) == before


@pytest.mark.parametrize("command", ["create", "convert"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_image_does_not_become_its_own_base(
    command: str, depth: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image is not replaced by an overlay over itself or over its own overlays."""
    base = qemu.create(tmp_path / "0.qed", 1 << 20)
    qemu.io(base, "write -P 7 0 64k")
    for number in range(1, depth + 1):
        qemu.create(tmp_path / f"{number}.qed", backing=f"{number - 1}.qed")
    before = base.read_bytes()
    (tmp_path / "raw").write_bytes(b"x" * 512)
    words = {
        "create": ["create", "--force", "-b", f"{depth}.qed", str(base)],
        "convert": ["convert", "--force", "-B", f"{depth}.qed", str(tmp_path / "raw"), str(base)],
    }
    assert main(words[command]) == 17
    said = capsys.readouterr().err
    assert "0.qed: found the image itself" in said
    assert (f"through {depth}.qed" in said) is (depth > 0)
    assert said.count("\n") == 1
    assert base.read_bytes() == before


def test_a_directory_that_may_not_be_read(tmp_path: Path) -> None:
    """In a directory that cannot be opened for its sync, a file is created successfully."""
    directory = tmp_path / "place"
    directory.mkdir()
    directory.chmod(0o300)
    # Root ignores permissions unless it drops these capabilities.
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    command = [*without, sys.executable, "-m", "qedfuse.cli.qedimg"]
    command += ["create", "-q", str(directory / "a.qed"), "1M"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert qemu.check(directory / "a.qed").code == 0
