"""``qedimg create`` compared with ``qemu-img create``, and what it refuses."""

from __future__ import annotations

import errno
import os
import random
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.errors import ImageInUseError
from qedfuse.hostio import lockedfile, systemcalls, threadcalls
from qedfuse.ondisk.constants import Feature
from qedfuse.tools.editing import create as create_module
from tests.support import qemu
from tests.support.disks import header_of
from tests.support.share import share

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.hostio.locking import LockMode


def names(directory: Path) -> set[str]:
    """List a directory, hidden files included."""
    return set(os.listdir(directory))  # noqa: PTH208  names, not paths


@pytest.mark.parametrize("seed", range(share(8, of=20)))
def test_the_same_file_as_qemu(seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For any geometry, size and base the file is the same byte for byte as QEMU's."""
    chance = random.Random(seed)
    cluster_size, table_size = 1 << chance.randrange(12, 21), 1 << chance.randrange(5)
    most = min((cluster_size * table_size // 8) ** 2 * cluster_size, 1 << 45)
    size: int | None = chance.choice([0, 1, most - 512, chance.randrange(most)])
    ours, theirs, base = tmp_path / "ours.qed", tmp_path / "theirs.qed", tmp_path / "base"
    kind = chance.choice([None, "raw", "qed"])
    words = ["--cluster-size", str(cluster_size), "--table-size", str(table_size)]
    if kind:
        qemu.create(base, chance.randrange(min(most, 1 << 40)), image_format=kind)
        words += ["-b", base.name, "-F", kind]
        size = chance.choice([size, None])
    if chance.random() < 0.5:
        words = ["-o", f"cluster_size={cluster_size},table_size={table_size}"]
        words[1] += f",backing_file={base.name},backing_fmt={kind}" if kind else ""
    sizes = [] if size is None else [str(size)]
    with caplog.at_level("ERROR", "qedfuse.cli.qedimg.geometry"):
        assert main(["create", "-q", *words, str(ours), *sizes]) == 0
    qemu.create(
        theirs,
        size,
        cluster_size=cluster_size,
        table_size=table_size,
        backing=base.name if kind else None,
        backing_format=kind or "qed",
    )
    assert ours.read_bytes() == theirs.read_bytes()
    assert names(tmp_path) == {"ours.qed", "theirs.qed"} | ({"base"} if kind else set())


USAGE: Final = {
    "no-size": ("IMAGE", "size: found none, expected a size, or a backing file"),
    "unsafe-no-size": ("-u -b gone -F qed IMAGE", "size: found none, expected a size\n"),
    "negative": ("IMAGE -5", "size: found '-5'"),
    "fraction": ("IMAGE 1.5", "size: found '1.5'"),
    "words": ("IMAGE big", "size: found 'big'"),
    "too-large": ("IMAGE 65T", "image size: found 71468255805440, expected 0 to 70368744177664"),
    "geometry": ("--cluster-size 4K --table-size 1 IMAGE 2G", "expected 0 to 1073741824 with"),
    "cluster": ("--cluster-size 5000 IMAGE 1M", "cluster size: found 5000, expected a power of"),
    "cluster-0": ("--cluster-size 0 IMAGE 1M", "cluster size: found 0"),
    "table": ("--table-size 3 IMAGE 1M", "table size: found 3, expected a power of two from 1"),
    "table-32": ("--table-size 32 IMAGE 1M", "table size: found 32"),
    "format-alone": ("-F raw IMAGE 1M", "base format: found raw, expected -b as well"),
    "unsafe-alone": ("-u IMAGE 1M", "-u: expected -b as well"),
    "unsafe-format": (
        "-u -b gone IMAGE 1M",
        "backing file gone: found no format, expected -F raw or -F qed",
    ),
    "full-overlay": ("--preallocate full -b base.qed IMAGE", "full image reads nothing from a"),
    "no-name": ("-b= IMAGE 1M", "backing file: found an empty name"),
    "no-path": ("-u -F raw -b file: IMAGE 1M", "backing file file:: found no path after file:"),
    "key": ("-o compat=1 IMAGE 1M", "option -o: found compat=1, expected KEY=VALUE"),
    "no-value": ("-o cluster_size IMAGE 1M", "option -o: found cluster_size, expected KEY"),
    "twice": ("-o cluster_size=4K --cluster-size 8K IMAGE 1M", "cluster_size: found two values"),
    "format": ("-o backing_file=base.qed,backing_fmt=ext4 IMAGE 1M", "expected raw or qed"),
    "protocol": ("-u -F raw -b nbd:host:1 IMAGE 1M", "backing file nbd:host:1: expected a plain"),
    "directory": ("gone/IMAGE 1M", "cannot create: found no directory gone"),
}
BASES: Final = {
    "missing": ("-b gone IMAGE", "backing file gone: cannot open: No such file"),
    "itself": ("-b IMAGE IMAGE 1M", "found the image itself"),
    "by-link": ("-b link IMAGE --force 1M", "found the image itself"),
    "unknown": ("-b plain IMAGE", "found no QED magic, expected a QED image, or -F raw"),
    "not-qed": ("-b plain -F qed IMAGE", "found no QED magic, expected a QED image"),
    "directory": ("-b . -F raw IMAGE", "found a directory, expected a regular file"),
    "broken": ("-b broken IMAGE", "header field cluster_size: found 3"),
}


@pytest.mark.parametrize("row", [*USAGE, *(f"base {name}" for name in BASES)])
def test_mistakes_get_one_line_and_leave_nothing(
    row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each mistake is one line, and no file is created or changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").write_bytes(b"plain" + bytes(5000))
    (tmp_path / "link").symlink_to("new.qed")
    qemu.create(tmp_path / "base.qed", 1 << 20)
    broken = bytearray((tmp_path / "base.qed").read_bytes())
    broken[4:8] = b"\3\0\0\0"
    (tmp_path / "broken").write_bytes(broken)
    before = names(tmp_path)
    base = row.startswith("base ")
    words, expected = BASES[row.removeprefix("base ")] if base else USAGE[row]
    assert main(["create", *words.replace("IMAGE", "new.qed").split()]) == (17 if base else 1)
    said = capsys.readouterr()
    assert said.out == ""
    assert expected in said.err
    assert said.err.startswith("qedimg: ")
    assert said.err.count("\n") == 1
    assert names(tmp_path) == before


def test_a_file_is_replaced_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An existing file is replaced only with --force, and never while it is in use."""
    path = tmp_path / "old.qed"
    path.write_bytes(b"precious")
    assert main(["create", str(path), "1M"]) == 1
    assert "exists already (--force replaces it)" in capsys.readouterr().err
    assert path.read_bytes() == b"precious"
    assert main(["create", "--force", str(path), "1M"]) == 0
    assert qemu.info(path)["virtual-size"] == 1 << 20
    before = path.read_bytes()
    capsys.readouterr()
    with qemu.hold(path):
        assert main(["create", "--force", str(path), "2M"]) == 16
    assert "in use" in capsys.readouterr().err
    assert path.read_bytes() == before
    (tmp_path / "directory").mkdir()
    assert main(["create", "--force", str(tmp_path / "directory"), "1M"]) == 12
    assert "found a directory, expected a regular file" in capsys.readouterr().err
    assert names(tmp_path) == {"old.qed", "directory"}


def test_a_base_is_found_from_the_directory_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative base begins at the image's directory, as with QEMU, and its format is detected."""
    (tmp_path / "images").mkdir()
    base, path = tmp_path / "images" / "base.qed", tmp_path / "images" / "top.qed"
    qemu.create(base, 3 << 20)
    qemu.io(base, "write -P 7 1M 4K")
    monkeypatch.chdir("/")
    with qemu.hold(base):
        assert main(["create", "-q", "-b", "base.qed", str(path)]) == 0
    info = qemu.info(path)
    assert (info["virtual-size"], info["backing-filename"]) == (3 << 20, "base.qed")
    qemu.io(path, "read -P 7 1M 4K")
    assert not header_of(path.read_bytes()[:64]).features & Feature.BACKING_FORMAT_NO_PROBE
    assert main(["create", "-q", "-u", "-F", "raw", "-b", "gone", str(path), "1M", "--force"]) == 0
    assert header_of(path.read_bytes()[:64]).backing_is_raw


@pytest.mark.expect_log("new.qed: QEMU cannot open an image with clusters of")
@pytest.mark.parametrize("table_size", [1, 2, 4, 8, 16])
def test_geometries_that_qemu_refuses_get_a_warning(
    table_size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An image is created, or converted to, with a warning if and only if QEMU cannot open it."""
    path, source = tmp_path / "new.qed", tmp_path / "a.raw"
    source.write_bytes(bytes(512))
    accepted = []
    for cluster_size in (1 << bits for bits in range(12, 27)):
        geometry = ["--cluster-size", str(cluster_size), "--table-size", str(table_size)]
        caplog.clear()
        assert main(["create", "--force", *geometry, str(path), "1M"]) == 0
        assert main(["convert", "--force", *geometry, str(source), str(path)]) == 0
        warned = f"clusters of {cluster_size} bytes and tables of {table_size} cluster"
        try:
            qemu.info(path)
        except qemu.QemuError:
            assert caplog.text.count(warned) == 2
            assert main(["check", "-q", str(path)]) == 0
        else:
            assert not caplog.text
            accepted.append(cluster_size)
    assert bool(accepted) is (table_size > 1)


@pytest.mark.parametrize(("cluster_size", "size"), [("4K", 3 << 20), ("1M", (20 << 20) + 512)])
def test_full_preallocation(cluster_size: str, size: int, tmp_path: Path) -> None:
    """With full preallocation each cluster is mapped and has space, and the disk reads as zeros."""
    path = tmp_path / "full.qed"
    words = ["create", "-q", "--preallocate", "full", "--cluster-size", cluster_size]
    assert main([*words, str(path), str(size)]) == 0
    found = qemu.check(path)
    assert (found.code, found.data["allocated-clusters"]) == (0, found.data["total-clusters"])
    assert path.stat().st_blocks * 512 >= size
    assert not any(qemu.content(path))


@pytest.mark.parametrize("is_locked", [False, True])
def test_a_new_image_that_cannot_be_opened_again(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_locked: bool,
) -> None:
    """If the new image cannot be filled, the message has its name, not that of the temporary."""
    path = tmp_path / "full.qed"

    def fail(fd: int, _mode: object, name: str) -> None:
        os.fstat(fd)
        msg = f"{name}: in use"
        raise ImageInUseError(msg)

    def no_descriptor(*_arguments: object, **_more: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def open_again(path: str, lock: LockMode | None, *, writable: bool, name: str) -> int:
        if is_locked:
            monkeypatch.setattr(lockedfile, "lock_image", fail)
        else:
            monkeypatch.setattr(os, "open", no_descriptor)
        try:
            return lockedfile.open_locked(path, lock, writable=writable, name=name)
        finally:
            monkeypatch.undo()

    monkeypatch.setattr(create_module, "open_locked", open_again)
    code = main(["create", "-q", "--preallocate", "full", str(path), "1M"])
    expected = "in use" if is_locked else "cannot open: Too many open files"
    assert capsys.readouterr().err == f"qedimg: {path}: {expected}\n"
    assert code == (16 if is_locked else 1)
    assert names(tmp_path) == set()


def test_a_full_host_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full host one line is printed, no file is left, and an old file is unchanged."""
    path = tmp_path / "full.qed"
    path.write_bytes(b"precious")
    real = systemcalls.fallocate

    def full(fd: int, mode: int, offset: int, length: int) -> None:
        if offset > 8 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, mode, offset, length)

    monkeypatch.setenv("QEDFUSE_HOST_CALLS", "threads")
    monkeypatch.setattr(threadcalls, "fallocate", full)
    code = main(["create", "-q", "--force", "--preallocate", "full", str(path), "100M"])
    assert code == 1
    said = capsys.readouterr().err
    assert f"{path}: reserve: No space left on device" in said
    assert said.count("\n") == 1
    assert names(tmp_path) == {"full.qed"}
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("image_format", "stated", "found"),
    [
        ("qcow2", "vmdk", "a qcow2 image, expected the format vmdk"),
        ("vdi", "qcow2", "a VDI image, expected the format qcow2"),
        ("qed", "qcow2", "a QED image, expected the format qcow2"),
        ("raw", "vpc", "no magic of an image, expected the format vpc"),
        ("qcow2", "qed", "no QED magic, expected a QED image"),
    ],
)
def test_base_in_another_format_than_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], image_format: str, stated: str, found: str
) -> None:
    """A base whose first bytes have another format than -F is refused, and no image is made."""
    base = qemu.create(tmp_path / "base", 1 << 20, image_format=image_format)
    image = tmp_path / "vm.qed"
    assert main(["create", "-b", str(base), "-F", stated, str(image)]) == 17
    assert f"{image}: backing file {base}: found {found}" in capsys.readouterr().err
    assert not image.exists()


def test_base_without_qemu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without qemu-nbd a base in another format is refused with a line that says so."""
    base = qemu.create(tmp_path / "base", 1 << 20, image_format="qcow2")
    image = tmp_path / "vm.qed"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["create", "-b", str(base), str(image)]) == 25
    expected = f"{image}: backing file {base}: found no program qemu-nbd"
    assert expected in capsys.readouterr().err
    assert not image.exists()
