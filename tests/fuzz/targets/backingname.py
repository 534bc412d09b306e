"""Names of backing files: whatever name an image stores, only files of its directory are opened."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Final

import trio

from qedfuse.disk.lookup.backing import open_bases
from qedfuse.disk.lookup.backingpath import chain_paths
from qedfuse.disk.lookup.tablecache import make_store
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import QedError
from qedfuse.hostio.imagefile import open_image_file, read_header
from qedfuse.tools.inspection.info import describe
from tests.fuzz.targets.drawn import Drawn
from tests.fuzz.targets.scratch import put, scratch
from tests.fuzz.targets.target import Target, assert_line
from tests.support import qemu
from tests.support.disks import build_image

_MAX_NAME_BYTES: Final = 4032
"""Maximum length of a name directly behind the header in clusters of 4 KiB."""


@functools.cache
def _directory() -> Path:
    """Return the directory of the images, with files and links that a name can lead to."""
    outside = scratch("backingname")
    inside = outside / "images"
    inside.mkdir()
    (outside / "secret.raw").write_bytes(b"s" * 512)
    (inside / "base.raw").write_bytes(b"b" * 512)
    (inside / "base.qed").write_bytes(build_image(1 << 20, {0: b"b"}))
    (inside / "loop.qed").write_bytes(build_image(1 << 20, backing=b"image.qed"))
    (inside / "deep.qed").write_bytes(build_image(1 << 20, backing=b"../secret.raw", features=4))
    (inside / "foreign.qcow2").write_bytes(b"QFI\xfb".ljust(512, b"\0"))
    (inside / "link.raw").symlink_to("../secret.raw")
    (inside / "inner.qed").write_bytes(build_image(1 << 20, backing=b"secret.raw", features=4))
    (outside / "inward.qed").symlink_to("images/inner.qed")
    (inside / "sub").mkdir()
    os.mkfifo(inside / "fifo")
    return inside


def _image(data: bytes) -> bytes:
    """Return the image that stores the name in an input, after a byte of feature bits."""
    drawn = Drawn(data)
    features = drawn.number() & 4
    name = drawn.rest()[:_MAX_NAME_BYTES] or b"x"
    return bytes(build_image(1 << 20, {1: 1}, backing=name, features=features))


def check(data: bytes) -> None:
    """Open the bases of an image under the default policy, and follow its names."""
    directory = _directory()
    path = put(directory / "image.qed", _image(data))
    assert trio.run(_open, path, str(directory)), "a base outside of the directory was opened"
    for name in chain_paths(path, str(directory)):
        assert name
    described = describe(path)
    if described.qed is not None:
        assert all(problem.message.isprintable() for problem in described.qed.problems)


def _path_of(descriptor: int) -> str:
    """Return the path of an open file, without symbolic links."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


async def _open(path: str, directory: str) -> bool:
    """Open the bases; return False if one of them lies outside of the directory."""
    policy = BackingPolicy(working_directory=directory)
    options = OpenOptions(backing=policy)
    with open_image_file(path, None) as file:
        header = await read_header(file)
        try:
            layers = await open_bases(path, file, header, options, make_store(1 << 16))
        except QedError as error:
            assert_line(error)
            return True
        try:
            descriptors = [layer.file.fileno() for layer in layers]
            return all(_path_of(number).startswith(f"{directory}/") for number in descriptors)
        finally:
            for layer in layers:
                layer.file.close()


def ask_qemu(data: bytes) -> bool:
    """Compare the name that ``qemu-img info`` shows with the one that qedfuse reads."""
    image = _image(data)
    name = image[64 : 64 + int.from_bytes(image[60:64], "little")]
    path = put(_directory() / "image.qed", image)
    try:
        text = name.decode("ascii")
    except UnicodeDecodeError:
        return False
    if not text.isprintable():
        return False
    # QEMU needs an L1 table of two clusters or more (docs/qemu-differences.md).
    larger = build_image(1 << 20, table_size=2, backing=name, features=image[16] & 4)
    put(_directory() / "image.qed", larger)
    shown = qemu.info(path)["backing-filename"]
    described = describe(path)
    assert described.qed is not None
    assert described.qed.backing is not None
    assert described.qed.backing.name == shown
    return True


def seeds() -> list[bytes]:
    """Return names of each kind: plain, with a path, with a protocol, of a URL, of a link."""
    names = (
        *("base.raw", "base.qed", "loop.qed", "deep.qed", "foreign.qcow2", "link.raw", "fifo"),
        *("sub", "../secret.raw", "/etc/passwd", "file:base.raw", "file:../secret.raw", "./a:b"),
        *("inner.qed", "../inward.qed"),
        *("json:{}", "nbd://h/x", "https://h/base.raw", "s3://bucket/k", "image.qed", "sub/../x"),
        *("//proc/self/fd/0", "base.raw/", "sub/../../images/base.raw", "/dev/zero", "fat:rw:x"),
        "./" * 1000 + "base.raw",
    )
    return [bytes((number % 2 * 4,)) + name.encode() for number, name in enumerate(names)]


TARGET: Final = Target(
    check,
    seeds,
    (
        b"../",
        b"file:",
        b"json:",
        b"nbd:",
        b"://",
        b"\x00",
        b"/",
        b"\xff",
        b"base.raw",
        b"%2e%2e/",
        b"/proc/self/",
        b"secret.raw",
        b"link.raw",
        b"../inward.qed",
    ),
    max_bytes=4096,
    ask_peer=ask_qemu,
)
