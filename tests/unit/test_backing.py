"""Backing files: which names an image may have, and the message of every refusal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qedfuse.disk.lookup.backingpath import MAX_CHAIN_DEPTH
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import (
    BackingError,
    BackingRefusedError,
    HeaderError,
    HostError,
    ImageError,
    QedError,
    UnsupportedError,
)
from qedfuse.ondisk.constants import Feature
from tests.support.disks import build_image, pattern

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qedfuse.disk.disk import Disk

CLUSTER = 4096
SIZE = 4 * CLUSTER
BASE = pattern(SIZE, 5)


@dataclass(frozen=True)
class Directories:
    """The directories of one test: ``images`` holds the image, ``other`` is its sibling."""

    images: Path
    other: Path

    def image(self, backing: str | bytes, name: str = "top.qed", *, raw: bool = False) -> str:
        """Make an empty overlay that names ``backing``; give its path."""
        features = int(Feature.BACKING_FORMAT_NO_PROBE) if raw else 0
        path = self.images / name
        path.write_bytes(build_image(SIZE, backing=os.fsencode(backing), features=features))
        return str(path)


@pytest.fixture
def place(tmp_path: Path) -> Directories:
    """Two directories, each with a raw file ``base.img`` of its own."""
    made = Directories(tmp_path / "images", tmp_path / "other")
    for number, directory in enumerate((made.images, made.other)):
        directory.mkdir()
        (directory / "base.img").write_bytes(BASE if not number else pattern(SIZE, 6))
    return made


async def read(path: str, policy: BackingPolicy | None = None, length: int = SIZE) -> bytes:
    """Open a chain and read from its start."""
    options = OpenOptions(backing=policy or BackingPolicy())
    async with open_disk(path, options) as disk:
        return bytes(await disk.read(0, length))


def open_files() -> int:
    """Count the open descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def refused(
    path: str,
    *words: str,
    policy: BackingPolicy | None = None,
    error: type[QedError] = BackingRefusedError,
) -> None:
    """Assert that a chain is refused with one line that contains all the words."""
    descriptors = open_files()
    with pytest.raises(error) as caught:
        await read(path, policy)
    assert type(caught.value) is error
    message = str(caught.value)
    for word in (path, *words):
        assert word in message
    assert message.isprintable()
    assert open_files() == descriptors, "every file was closed again"


# --- where a name leads ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["base.img", "./base.img", "sub/../base.img", "link.img"])
async def test_names_inside_the_directory(place: Directories, name: str) -> None:
    """A relative name starts at the directory of the image that has it."""
    (place.images / "sub").mkdir()
    (place.images / "link.img").symlink_to("base.img")
    assert await read(place.image(name)) == BASE


async def test_relative_to_the_image_and_not_to_the_caller(
    place: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory has no influence on where a relative name leads."""
    place.image("base.img")
    monkeypatch.chdir(place.other)
    assert await read("../images/top.qed") == BASE
    monkeypatch.chdir(place.images)
    assert await read("top.qed") == BASE
    assert await read("./top.qed") == BASE


async def test_absolute_name_inside_the_directory(place: Directories) -> None:
    """An absolute name is allowed if it leads into the directory of the image."""
    assert await read(place.image(str(place.images / "base.img"))) == BASE


async def test_each_layer_s_names_are_its_own(place: Directories) -> None:
    """A base in a subdirectory names its own base relative to that subdirectory."""
    sub = place.images / "sub"
    sub.mkdir()
    (sub / "bottom.img").write_bytes(BASE)
    (sub / "middle.qed").write_bytes(build_image(SIZE, {1: b"middle"}, backing=b"bottom.img"))
    expected = bytearray(BASE)
    expected[CLUSTER : 2 * CLUSTER] = b"middle".ljust(CLUSTER, b"\0")
    assert await read(place.image("sub/middle.qed")) == expected


async def test_base_is_confined_to_its_own_directory(place: Directories) -> None:
    """A base in a subdirectory may only name bases inside that subdirectory."""
    sub = place.images / "sub"
    sub.mkdir()
    (sub / "middle.qed").write_bytes(build_image(SIZE, backing=b"../base.img"))
    path = place.image("sub/middle.qed")
    with pytest.raises(BackingRefusedError, match=f"{sub}/middle.qed: backing file"):
        await read(path)
    policy = BackingPolicy(directories=(str(place.images),))
    assert await read(path, policy) == BASE


async def test_image_behind_a_symbolic_link(place: Directories) -> None:
    """A relative name starts at the directory of the symbolic link, as in QEMU."""
    place.image("base.img")
    (place.other / "link.qed").symlink_to(place.images / "top.qed")
    assert await read(str(place.other / "link.qed")) == pattern(SIZE, 6)


@pytest.mark.parametrize("way", ["dots", "absolute", "link", "directory link", "hard dots"])
async def test_outside_the_directory(place: Directories, way: str) -> None:
    """A base outside the directory is refused with both options that allow it."""
    target = str(place.other / "base.img")
    (place.images / "link.img").symlink_to(target)
    (place.images / "elsewhere").symlink_to(place.other)
    name = {
        "dots": "../other/base.img",
        "absolute": target,
        "link": "link.img",
        "directory link": "elsewhere/base.img",
        "hard dots": "elsewhere/../other/base.img",
    }[way]
    path = place.image(name)
    await refused(
        path,
        f"found {target}",
        f"expected a file inside {place.images}",
        f"allow it with backing_dir={place.other}",
        " or backing=any",
    )
    outside = pattern(SIZE, 6)
    assert await read(path, BackingPolicy(directories=(str(place.other),))) == outside
    assert await read(path, BackingPolicy(mode="any")) == outside


async def test_directory_with_the_same_prefix(place: Directories) -> None:
    """``/images-secret`` is not inside ``/images``."""
    secret = place.images.with_name("images-secret")
    secret.mkdir()
    (secret / "base.img").write_bytes(BASE)
    await refused(place.image("../images-secret/base.img"), f"found {secret}/base.img")


async def test_allowed_directory_may_be_a_link(place: Directories) -> None:
    """``backing_dir`` is resolved through links, with or without a slash at its end."""
    link = place.images / "allowed"
    link.symlink_to(place.other)
    path = place.image("../other/base.img")
    for directory in (str(link), f"{link}/"):
        assert await read(path, BackingPolicy(directories=(directory,)))
    assert await read(path, BackingPolicy(directories=("/",)))


async def test_backing_none(place: Directories) -> None:
    """With backing=none every base is refused, and an image without a base opens."""
    policy = BackingPolicy(mode="none", trusted=str(place.images / "base.img"))
    await refused(place.image("base.img"), "base.img", "backing=none", policy=policy)
    (place.images / "flat.qed").write_bytes(build_image(SIZE, {0: b"flat"}))
    assert (await read(str(place.images / "flat.qed"), policy))[:4] == b"flat"


async def test_trusted_base(place: Directories) -> None:
    """A base that the user named may be anywhere, but the base that it names may not."""
    target = place.other / "base.img"
    policy = BackingPolicy(trusted=str(target))
    path = place.image(str(target))
    assert await read(path, policy) == pattern(SIZE, 6)
    await refused(path, "refused", policy=BackingPolicy(trusted=str(place.images / "no")))
    middle = place.other / "middle.qed"
    middle.write_bytes(build_image(SIZE, backing=b"../images/base.img"))
    for trusted in (middle, place.images / "base.img"):
        policy = BackingPolicy(trusted=str(trusted))
        with pytest.raises(BackingRefusedError):
            await read(place.image(str(middle)), policy)
    middle.write_bytes(build_image(SIZE, backing=b"base.img"))
    policy = BackingPolicy(trusted=str(middle))
    assert await read(place.image(str(middle)), policy) == pattern(SIZE, 6)


# --- names that are not paths ----------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"file","filename":"/etc/passwd"}',
        "nbd:localhost:10809",
        "fat:/etc",
        ":",
    ],
)
async def test_protocols_are_refused_by_name(place: Directories, name: str) -> None:
    """A name with a protocol is refused, also where a file of that name exists."""
    for mode in ("confined", "any"):
        policy = BackingPolicy(mode=mode)
        await refused(place.image(name), name, "found a protocol", "./NAME", policy=policy)


@pytest.mark.parametrize(
    ("name", "reason", "error"),
    [
        ("http://localhost/disk", "found a URL, expected a local file", BackingRefusedError),
        ("nbd://localhost/disk", "found a URL, expected a local file", BackingRefusedError),
        ("ftp://localhost/disk", "URL scheme: found ftp://", BackingError),
        ("https:///disk", "URL host: found none", BackingError),
    ],
)
async def test_urls_are_refused_by_default(
    place: Directories, name: str, reason: str, error: type[QedError]
) -> None:
    """A URL is refused, also with ``backing=any``."""
    for mode in ("confined", "any"):
        policy = BackingPolicy(mode=mode)
        await refused(place.image(name), name, reason, policy=policy, error=error)


async def test_colon_in_a_plain_name(place: Directories) -> None:
    """A file with a colon in its name can be a base if its name is written as a path."""
    (place.images / "a:b").write_bytes(BASE)
    assert await read(place.image("./a:b")) == BASE


async def test_nul_in_a_name(place: Directories) -> None:
    """A name with a NUL byte is refused, since the kernel would read a shorter one."""
    await refused(place.image(b"base.img\0.qed"), "NUL", "base.img\\x00.qed")


async def test_name_that_would_drive_a_terminal(place: Directories) -> None:
    """Control characters in a name are escaped in messages."""
    path = place.image(b"no\n\x1b[2Jsuch\xff")
    await refused(path, "no\\n\\x1b[2Jsuch\\xff", error=BackingError)


# --- what a name may lead to ----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "No such file or directory"),
        ("directory", "found a directory, expected a regular file"),
        ("fifo", "found a FIFO, expected a regular file"),
        ("device", "found a character device, expected a regular file"),
        ("loop", "Too many levels of symbolic links"),
        ("dangling", "No such file or directory"),
        ("under a file", "Not a directory"),
    ],
)
async def test_base_that_is_no_file(place: Directories, kind: str, words: str) -> None:
    """A base that is not a regular file is refused without being opened."""
    name = kind.replace(" ", "-")
    target = place.images / name
    if kind == "directory":
        target.mkdir()
    elif kind == "fifo":
        os.mkfifo(target)
    elif kind == "device":
        target.symlink_to("/dev/null")
    elif kind == "loop":
        target.symlink_to(name)
    elif kind == "dangling":
        target.symlink_to("nowhere")
    elif kind == "under a file":
        name = "base.img/under"
    path = place.image(name)
    for mode in ("confined", "any"):
        policy = BackingPolicy(mode=mode)
        await refused(path, str(place.images / name), words, error=BackingError, policy=policy)


async def test_image_that_is_its_own_base(place: Directories) -> None:
    """An image that is its own base by name, symbolic link or hard link is refused."""
    for name in ("top.qed", "./top.qed", "link.qed", "hard.qed"):
        path = place.image(name)
        (place.images / "link.qed").unlink(missing_ok=True)
        (place.images / "hard.qed").unlink(missing_ok=True)
        (place.images / "link.qed").symlink_to("top.qed")
        os.link(path, place.images / "hard.qed")
        await refused(path, f"backing file {place.images}/{name}", "loop", error=BackingError)


async def test_loop_of_two(place: Directories) -> None:
    """Two images that name each other are refused."""
    path = place.image("second.qed")
    place.image("top.qed", "second.qed")
    with pytest.raises(BackingError, match=r"second.qed: backing file .*/top.qed: found a loop"):
        await read(path)


async def test_longest_chain(place: Directories) -> None:
    """A chain of the maximum length opens, a longer one is refused, and every file is closed."""
    (place.images / "layer0").write_bytes(BASE)
    for number in range(1, MAX_CHAIN_DEPTH + 2):
        place.image(f"layer{number - 1}", f"layer{number}")
    assert await read(str(place.images / f"layer{MAX_CHAIN_DEPTH}")) == BASE
    descriptors = open_files()
    with pytest.raises(BackingError, match=f"layer0: found a chain of more than {MAX_CHAIN_DEPTH}"):
        await read(str(place.images / f"layer{MAX_CHAIN_DEPTH + 1}"))
    assert open_files() == descriptors


# --- formats --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("magic", "what"),
    [
        (b"QFI\xfb\0\0\0\3", "a qcow2 image"),
        (b"KDMV", "a VMDK image"),
        (b"COWD", "a VMDK image"),
        (b"vhdxfile", "a VHDX image"),
        (b"conectix", "a VHD image"),
        (bytes(0x40) + b"\x7f\x10\xda\xbe", "a VDI image"),
    ],
)
async def test_base_of_another_format(place: Directories, magic: bytes, what: str) -> None:
    """A base of a foreign format is refused, unless the user or the header declares it raw."""
    content = magic.ljust(SIZE, b"\0")
    (place.images / "foreign").write_bytes(content)
    path = place.image("foreign")
    await refused(path, "foreign", what, "foreign=qemu", "backing_format=raw", error=BackingError)
    assert await read(path, BackingPolicy(format="raw")) == content
    assert await read(place.image("foreign", raw=True)) == content


async def test_only_the_named_base_may_be_foreign(place: Directories) -> None:
    """That the user has named another base does not allow a base of a foreign format."""
    (place.images / "foreign").write_bytes(b"QFI\xfb\0\0\0\3".ljust(SIZE, b"\0"))
    path = place.image("foreign")
    for name in ("base.img", "missing"):
        for mode in ("confined", "any"):
            policy = BackingPolicy(mode=mode, trusted=str(place.images / name))
            await refused(path, "foreign", "foreign=qemu", policy=policy, error=BackingError)


async def test_no_probe_is_honoured(place: Directories) -> None:
    """A QED header that a guest writes into its raw base is not followed."""
    inside = bytes(build_image(SIZE, {0: b"x"}, backing=b"/etc/passwd"))
    (place.images / "guest.img").write_bytes(inside)
    assert await read(place.image("guest.img", raw=True)) == inside[:SIZE]
    await refused_inside(place)


async def refused_inside(place: Directories) -> None:
    """Without the bit the header inside is followed, and its name is confined in turn."""
    path = place.image("guest.img")
    with pytest.raises(BackingRefusedError, match=r"guest.img: backing file /etc/passwd: refused"):
        await read(path)
    assert len(await read(path, BackingPolicy(format="raw"))) == SIZE


async def test_format_override(place: Directories) -> None:
    """``backing_format`` overrides the magic and NO_PROBE, in both directions."""
    image = build_image(SIZE, {0: b"inner"})
    (place.images / "inner.qed").write_bytes(image)
    for raw in (True, False):
        path = place.image("inner.qed", raw=raw)
        assert (await read(path, BackingPolicy(format="raw")))[:4] == b"QED\0"
        assert (await read(path, BackingPolicy(format="qed")))[:5] == b"inner"
    with pytest.raises(ImageError, match=r"base.img: not a QED image"):
        await read(place.image("base.img"), BackingPolicy(format="qed"))


@pytest.mark.parametrize("size", [0, 1, 511, CLUSTER + 7])
async def test_short_raw_base(place: Directories, size: int) -> None:
    """Past the end of a base, also one of odd length, the disk reads as zeros."""
    (place.images / "short").write_bytes(BASE[:size])
    assert await read(place.image("short")) == BASE[:size].ljust(SIZE, b"\0")


async def test_bad_header_in_a_base(place: Directories) -> None:
    """The message about a base that cannot be opened names the base."""
    (place.images / "bad.qed").write_bytes(build_image(SIZE, features=1 << 40))
    with pytest.raises(UnsupportedError, match=r"bad\.qed: header field features"):
        await read(place.image("bad.qed"))
    (place.images / "cut.qed").write_bytes(build_image(SIZE)[:CLUSTER])
    with pytest.raises(HeaderError, match=r"cut\.qed: header field l1_table_offset"):
        await read(place.image("cut.qed"))


async def test_base_that_needs_a_check_is_read(place: Directories) -> None:
    """NEED_CHECK in a base does not matter, also below a writable image."""
    (place.images / "dirty.qed").write_bytes(build_image(SIZE, {0: b"dirty"}, features=2))
    before = (place.images / "dirty.qed").read_bytes()
    async with open_disk(place.image("dirty.qed"), OpenOptions(writable=True)) as disk:
        await disk.write(10, b"overlay")
        assert (await disk.read(0, 20)) == b"dirty\0\0\0\0\0overlay\0\0\0"
    assert (place.images / "dirty.qed").read_bytes() == before


async def test_base_without_permission(place: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message about a base has the host's reason."""
    path = place.image("base.img")
    real = os.open

    def denied(name: str, flags: int, *args: int, **options: int) -> int:
        if name.endswith("base.img") and flags & os.O_PATH:
            raise PermissionError(13, "Permission denied")
        return real(name, flags, *args, **options)

    monkeypatch.setattr(os, "open", denied)
    await refused(path, "base.img", "Permission denied", error=BackingError)


async def test_image_itself_missing(place: Directories) -> None:
    """A missing image is reported as itself, not as a backing file."""
    with pytest.raises(HostError, match=r"nothing\.qed: cannot open"):
        await read(str(place.images / "nothing.qed"))


CHANGES: dict[str, Callable[[Disk], Awaitable[object]]] = {
    "write": lambda disk: disk.write(512, b"x" * 512),
    "write whole": lambda disk: disk.write(0, pattern(CLUSTER, 3)),
    "discard": lambda disk: disk.discard(CLUSTER, CLUSTER),
    "allocate": lambda disk: disk.allocate(0, CLUSTER),
    "grow": lambda disk: disk.grow(SIZE + CLUSTER),
    "shrink": lambda disk: disk.shrink(SIZE - CLUSTER, force=True),
}
"""What changes the content of a disk."""


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_a_disk_opened_without_its_base_is_read_only(
    tmp_path: Path, change: Callable[[Disk], Awaitable[object]]
) -> None:
    """A disk opened without its base refuses changes, which would hide the base."""
    base, top = tmp_path / "base.qed", tmp_path / "top.qed"
    base.write_bytes(build_image(SIZE, {0: pattern(CLUSTER, 1), 1: pattern(CLUSTER, 2)}))
    content = build_image(SIZE, {1: pattern(CLUSTER, 3)}, backing=b"base.qed")
    top.write_bytes(content)
    async with open_disk(str(top), OpenOptions(writable=True), with_bases=False) as disk:
        assert await disk.read(CLUSTER, CLUSTER) == pattern(CLUSTER, 3)
        assert disk.try_read(0, 512) is None
        with pytest.raises(BackingError, match="read at guest offset 0: needs the base"):
            await disk.read(0, 512)
        assert not disk.try_write(CLUSTER, b"x")
        with pytest.raises(BackingError, match="the image was opened without its base"):
            await change(disk)
        await disk.compact()
    assert top.read_bytes() == content
    async with open_disk(str(top)) as disk:
        assert await disk.read(0, CLUSTER) == pattern(CLUSTER, 1)
