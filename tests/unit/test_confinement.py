"""The directory that confines the bases of an image: the one in which the image was opened."""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.disk.lookup import basepolicy
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import BackingError, BackingRefusedError
from qedfuse.hostio.opendirectory import OpenDirectory
from qedfuse.hostio.posixfile import PosixFile
from tests.support import qemu
from tests.support.disks import build_image, pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SIZE: Final = 4 * 4096
SECRET: Final = pattern(SIZE, 3)
OWN: Final = pattern(SIZE, 4)


@dataclass(frozen=True)
class Directories:
    """Two directories with a file ``base.raw`` each: the author of images can write to ``images``.

    The other one, ``home``, belongs to a victim.
    """

    images: Path
    home: Path

    def image(self, name: str, backing: str) -> Path:
        """Make an empty overlay in ``images``."""
        path = self.images / name
        path.write_bytes(build_image(SIZE, backing=os.fsencode(backing)))
        return path

    def exchange(self, kind: str) -> None:
        """Let the path of ``images`` lead to ``home``: by a link, or in place of it."""
        self.images.rename(self.images.with_name("moved"))
        if kind == "link":
            self.images.symlink_to(self.home)
        else:
            self.home.rename(self.images)

    def restore(self, kind: str) -> None:
        """Undo `exchange`."""
        if kind == "link":
            self.images.unlink()
        else:
            self.images.rename(self.home)
        self.images.with_name("moved").rename(self.images)


@pytest.fixture
def place(tmp_path: Path) -> Directories:
    """Give the directories."""
    made = Directories(tmp_path / "images", tmp_path / "home")
    for directory, content in ((made.images, OWN), (made.home, SECRET)):
        directory.mkdir()
        (directory / "base.raw").write_bytes(content)
    return made


async def read(path: Path, **policy: object) -> bytes:
    """Return the content of a disk."""
    options = OpenOptions(backing=BackingPolicy(**policy))  # type: ignore[arg-type]
    async with open_disk(str(path), options) as disk:
        return bytes(await disk.read(0, SIZE))


def open_paths() -> list[str]:
    """Return the paths of all open descriptors."""
    found = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  the names alone
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115  a name
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return sorted(found)


def around_base(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[], None], after: Callable[[], None]
) -> list[str]:
    """Call two functions around the open of ``base.raw``; return a list that gets its path."""
    paths: list[str] = []
    real = PosixFile.open

    def opening(path: str, *, writable: bool = False) -> PosixFile:
        if not path.endswith("base.raw"):
            return real(path, writable=writable)
        before()
        file = real(path, writable=writable)
        paths.append(os.readlink(f"/proc/self/fd/{file.fd}"))  # noqa: PTH115  a name
        after()
        return file

    monkeypatch.setattr(PosixFile, "open", opening)
    return paths


@pytest.mark.parametrize("until", ["for ever", "until the base is open"])
@pytest.mark.parametrize("kind", ["link", "directory"])
@pytest.mark.parametrize("image_format", ["qed", "qcow2", "two images"])
async def test_exchanged_directory(
    place: Directories, monkeypatch: pytest.MonkeyPatch, image_format: str, kind: str, until: str
) -> None:
    """The path of an image that leads elsewhere once the image is open gives access to nothing."""
    path = place.image("top.qed", "base.raw")
    if image_format == "qcow2":
        path = place.images / "top.qcow2"
        qemu.run(
            *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw"),
            *("-b", "base.raw", path, str(SIZE)),
        )
    elif image_format == "two images":
        path = place.image("over.qed", "top.qed")
    before = open_paths()

    def restore() -> None:
        if until != "for ever":
            place.restore(kind)

    opened = around_base(monkeypatch, lambda: place.exchange(kind), restore)
    with pytest.raises(BackingRefusedError, match=r"refused: found .*, expected a file inside"):
        await read(path)
    place_of_secret = place.home if kind == "link" else place.images
    assert opened == [str(place_of_secret / "base.raw")], "the base of the victim was opened"
    assert open_paths() == before


@pytest.mark.parametrize("image_format", ["qed", "qcow2"])
async def test_link_that_leads_in(place: Directories, image_format: str) -> None:
    """A link outside of the directory, to an image in it, does not allow the link's directory."""
    inner = place.images / "inner.qed"
    qemu.run(
        *("qemu-img", "create", "-q", "-u", "-f", "qed", "-F", "raw"),
        *("-b", "base.raw", inner, str(SIZE)),
    )
    (place.home / "current.qed").symlink_to(inner)
    assert await read(place.home / "current.qed") == SECRET, "the user may name the link"
    path = place.image("top.qed", "../home/current.qed")
    if image_format == "qcow2":
        path = place.images / "top.qcow2"
        qemu.run(
            *("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qed"),
            *("-b", "../home/current.qed", path, str(SIZE)),
        )
    before = open_paths()
    with pytest.raises(BackingRefusedError, match=f"expected a file inside {place.images} "):
        await read(path)
    assert open_paths() == before
    # Relative names still begin at the link, as in QEMU, and may lead back into the directory.
    (place.home / "base.raw").unlink()
    (place.home / "base.raw").symlink_to(place.images / "base.raw")
    assert await read(path) == OWN


async def test_link_in_an_allowed_directory(place: Directories) -> None:
    """The directory of a link counts if it lies in an allowed directory itself."""
    (place.images / "sub").mkdir()
    (place.images / "sub" / "base.raw").write_bytes(SECRET)
    inner = place.image("inner.qed", "base.raw")
    (place.images / "sub" / "link.qed").symlink_to(inner)
    assert await read(place.image("top.qed", "sub/link.qed")) == SECRET
    (place.home / "link.qed").symlink_to(inner)
    path = place.image("top.qed", "../home/link.qed")
    assert await read(path, directories=(str(place.home),)) == SECRET


async def test_link_that_the_user_names(place: Directories) -> None:
    """The directory of a link counts for a trusted base if the user has named this link."""
    inner = place.image("inner.qed", "base.raw")
    (place.home / "current.qed").symlink_to(inner)
    path = place.image("top.qed", "../home/current.qed")
    assert await read(path, trusted=str(place.home / "current.qed")) == SECRET
    with pytest.raises(BackingRefusedError, match=f"expected a file inside {place.images} "):
        await read(path, trusted=str(inner))


async def test_trusted_base_without_a_directory(place: Directories) -> None:
    """A base that the user names by an inherited descriptor may be in no directory any more."""
    base = place.home / "base.raw"
    fd = os.open(base, os.O_RDONLY)
    try:
        base.unlink()
        path = place.image("top.qed", f"/dev/fd/{fd}")
        assert await read(path, trusted=f"/dev/fd/{fd}") == SECRET
        with pytest.raises(BackingError, match="cannot find its directory: No such file"):
            await read(path)
    finally:
        os.close(fd)


@pytest.mark.parametrize("base_format", ["raw", "qed"])
async def test_trusted_base_whose_directory_is_unknown(
    place: Directories, monkeypatch: pytest.MonkeyPatch, base_format: str
) -> None:
    """If the image names a trusted base by another path, only files that it names are refused."""
    (place.home / "own.raw").write_bytes(SECRET)
    target = place.images / "target"
    target.write_bytes(OWN if base_format == "raw" else build_image(SIZE, backing=b"own.raw"))
    trusted = place.images / "trusted"
    trusted.hardlink_to(target)
    (place.home / "base.raw").unlink()
    (place.home / "base.raw").symlink_to(target)
    path = place.image("top.qed", "../home/base.raw")
    before = open_paths()
    around_base(monkeypatch, lambda: None, target.unlink)
    if base_format == "raw":
        assert await read(path, trusted=str(trusted)) == OWN
    else:
        message = r"home/base\.raw: backing file: refused: found no directory of this image"
        with pytest.raises(BackingRefusedError, match=message):
            await read(path, trusted=str(trusted))
    assert open_paths() == before


@contextmanager
def below_unsearchable(place: Directories) -> Iterator[None]:
    """In the block, work in ``images``, as a user who cannot search the directories above it."""
    above = place.images.parent
    mode, user, old = above.stat().st_mode & 0o777, os.geteuid(), os.open(".", os.O_PATH)
    os.chdir(place.images)
    try:
        above.chmod(0)
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        os.fchdir(old)
        os.close(old)
        above.chmod(mode)


@pytest.mark.parametrize("target", ["sub/base.raw", "second.raw"])
async def test_link_below_an_unsearchable_directory(place: Directories, target: str) -> None:
    """A link to a base in the image's directory needs no permission for the directories above."""
    (place.images / "sub").mkdir()
    (place.images / "sub" / "base.raw").write_bytes(SECRET)
    (place.images / "second.raw").symlink_to("sub/../sub/base.raw")
    (place.images / "link.raw").symlink_to(target)
    path = place.image("top.qed", "link.raw")
    before = open_paths()
    with below_unsearchable(place):
        with pytest.raises(PermissionError):
            path.stat()
        assert await read(path.relative_to(place.images)) == SECRET
    assert open_paths() == before


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("base.raw", "Too many levels of symb"),
        ("other.raw", "No such file"),
        (None, "No such file"),
    ],
)
async def test_link_that_changes_below_an_unsearchable_directory(
    place: Directories, monkeypatch: pytest.MonkeyPatch, then: str | None, reason: str
) -> None:
    """A link that leads elsewhere once the base is open is refused in one line."""
    path = place.image("top.qed", "base.raw")
    (place.images / "base.raw").rename(place.images / "target.raw")
    (place.images / "other.raw").write_bytes(OWN)
    link = place.images / "base.raw"
    link.symlink_to("target.raw")
    place.images.chmod(0o777)

    def exchange() -> None:
        os.unlink("base.raw")  # noqa: PTH108  relative to the working directory
        if then is not None:
            os.symlink(then, "base.raw")  # noqa: PTH211  relative to the working directory

    before = open_paths()
    around_base(monkeypatch, lambda: None, exchange)
    with (
        below_unsearchable(place),
        pytest.raises(BackingError, match=f"cannot find its directory: {reason}"),
    ):
        await read(path.relative_to(place.images))
    assert open_paths() == before


async def test_link_that_changes(place: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that leads to another image once the base is open does not matter."""
    path = place.image("top.qed", "base.raw")
    link = place.images / "base.raw"
    link.rename(place.images / "target.raw")
    link.symlink_to("target.raw")

    def exchange() -> None:
        link.unlink()
        link.symlink_to(place.home / "base.raw")

    around_base(monkeypatch, lambda: None, exchange)
    assert await read(path) == OWN


@pytest.fixture(params=["looping link", "long name", "file", "dead server"])
def unusable(place: Directories, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Give a path that leads to no directory, or to one whose server has ended."""
    path = place.home / "unusable"
    if request.param == "looping link":
        path.symlink_to(path)
    elif request.param == "long name":
        path = place.home / ("n" * 256)
    elif request.param == "file":
        path.touch()
    else:
        path.mkdir()
        mount_dead(path)
    yield path
    if request.param == "dead server":
        subprocess.run(["umount", "-l", path], check=True)


def mount_dead(directory: Path) -> None:
    """Mount a FUSE file system whose server has ended."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system without a server")
    with closing(open("/dev/fuse", "r+b", buffering=0)) as device:  # noqa: PTH123  a device
        fd = device.fileno()
        options = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
        command = ["mount", "-i", "-t", "fuse", "-o", options, "dead", str(directory)]
        subprocess.run(command, check=True, pass_fds=(fd,))
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        directory.stat()


async def test_unusable_directory(place: Directories, unusable: Path) -> None:
    """A directory of the policy that cannot be used is ignored."""
    allowed = (str(unusable), str(place.home))
    before = open_paths()
    assert await read(place.image("top.qed", "base.raw"), directories=allowed[:1]) == OWN
    path = place.image("out.qed", "../home/base.raw")
    assert await read(path, directories=allowed) == SECRET
    with pytest.raises(BackingRefusedError, match=f"expected a file inside {place.images} "):
        await read(path, directories=allowed[:1])
    assert open_paths() == before


async def test_no_free_descriptor(place: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a free descriptor, an allowed directory does not count as one that is missing."""

    class Failing(OpenDirectory):
        def __init__(self, path: str, *, dir_fd: int | None = None) -> None:
            if path == str(place.home):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            super().__init__(path, dir_fd=dir_fd)

    path = place.image("top.qed", "../home/base.raw")
    before = open_paths()
    monkeypatch.setattr(basepolicy, "OpenDirectory", Failing)
    with pytest.raises(BackingError, match="cannot find its directory: Too many open files"):
        await read(path, directories=(str(place.home),))
    assert open_paths() == before


@pytest.mark.parametrize("is_link", [False, True])
async def test_base_that_is_removed_meanwhile(
    place: Directories, monkeypatch: pytest.MonkeyPatch, *, is_link: bool
) -> None:
    """A base that is removed while it is opened is refused in one line."""
    target = place.images / "base.raw"
    if is_link:
        target = target.rename(place.images / "target.raw")
        (place.images / "base.raw").symlink_to(target)
    path = place.image("top.qed", "base.raw")
    before = open_paths()
    around_base(monkeypatch, lambda: None, target.unlink)
    with pytest.raises(BackingError, match="cannot find its directory: No such file") as caught:
        await read(path)
    assert str(caught.value).startswith(f"{path}: backing file {place.images}/base.raw: ")
    assert open_paths() == before


async def test_failing_system_call(place: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the host during the check is one line, and closes the base."""

    def failing(_directory: object, _other: object) -> bool:
        raise OSError(errno.EINVAL, "Invalid argument")

    path = place.image("top.qed", "base.raw")
    before = open_paths()
    monkeypatch.setattr(OpenDirectory, "holds", failing)
    with pytest.raises(BackingError, match=r"base\.raw: cannot find its directory: Invalid arg"):
        await read(path)
    assert open_paths() == before


@pytest.mark.parametrize("mode", ["confined", "any"])
@pytest.mark.parametrize("image_format", ["qed", "qcow2"])
async def test_no_directory_stays_open(place: Directories, image_format: str, mode: str) -> None:
    """While a disk is served, only its files are open, and no directory."""
    middle = place.image("middle.qed", "base.raw")
    if image_format == "qcow2":
        middle = place.images / "middle.qcow2"
        qemu.run(
            *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw"),
            *("-b", "base.raw", middle, str(SIZE)),
        )
    path = place.image("top.qed", middle.name)
    policy = BackingPolicy(mode=mode, foreign="qemu")  # type: ignore[arg-type]
    async with open_disk(str(path), OpenOptions(backing=policy)) as disk:
        assert bytes(await disk.read(0, SIZE)) == OWN
        files = [name for name in open_paths() if name.startswith(str(place.images))]
    assert sorted(files) == sorted(map(str, (path, middle, place.images / "base.raw")))
