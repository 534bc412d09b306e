"""The commands on URLs of NBD servers, each run as a user runs it."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import qedfuse
from tests.support import programs, qemu
from tests.support.mounted import mounted, refused
from tests.support.nbdservers import serving_nbd, why_no_server
from tests.support.nginx import serving_nginx, why_no_nginx

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(bool(why_no_server("nbdkit")), reason=why_no_server("nbdkit"))

MIB = 1 << 20


@contextmanager
def served(directory: Path, *words: str | Path) -> Iterator[str]:
    """Run nbdkit for the block; yield the URL of its export."""
    directory.mkdir(exist_ok=True)
    with serving_nbd(directory, "nbdkit", *words):
        yield f"nbd+unix:///?socket={directory}/socket"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """Return a QED image of 8 MiB with some data."""
    path = tmp_path / "golden.qed"
    qemu.create(path, 8 * MIB)
    qemu.io(path, "write -P 7 1M 1M", "write -P 9 5M 64k")
    return path


def qedimg(*words: str | Path, code: int = 0) -> str:
    """Run qedimg; return what it prints, on stderr if it fails."""
    done = programs.run("qedimg", *words, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def test_qedimg_reads_a_qed_image_on_a_server(golden: Path, tmp_path: Path) -> None:
    """Info, map, check, measure, convert and compare work as for the file that is served."""
    with served(tmp_path / "server", "file", golden) as url:
        for words in (["map", "--output=json"], ["check"], ["measure", "-O", "qed"]):
            assert qedimg(*words, url) == qedimg(*words, golden).replace(str(golden), url)
        assert "virtual size: 8 MiB" in qedimg("info", url)
        qedimg("convert", "-O", "raw", url, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == qemu.content(golden)
        assert qedimg("compare", url, golden) == "Images are identical.\n"


def test_a_raw_export_is_converted(tmp_path: Path) -> None:
    """A raw export of a plugin becomes a QED image with the same bytes."""
    with served(tmp_path / "server", "data", "data=@1048576 1*65536 @3145728", "size=4M") as url:
        qedimg("convert", "-f", "raw", "-O", "qed", url, tmp_path / "copy.qed")
    expected = bytes(MIB) + b"\1" * 65536
    assert qemu.content(tmp_path / "copy.qed") == expected.ljust(4 * MIB, b"\0")


def test_a_mount_reads_and_an_overlay_takes_the_writes(golden: Path, tmp_path: Path) -> None:
    """A mount of a URL shows the disk; an overlay over it keeps the writes."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    expected = qemu.content(golden)
    with served(tmp_path / "server", "file", golden) as url:
        with mounted(url, mountpoint, "-r"):
            assert (mountpoint / "export.raw").read_bytes() == expected
        for _ in range(2):
            with mounted(url, mountpoint, "-o", f"overlay={tmp_path}/vm.qed"):
                disk = mountpoint / "export.raw"
                assert disk.read_bytes()[MIB:] == expected[MIB:]
                with disk.open("r+b") as file:
                    file.write(b"written")
                assert disk.read_bytes()[:7] == b"written"
        with qedfuse.open(url) as opened:
            assert opened.read() == expected


def test_a_raw_export_is_a_source(tmp_path: Path) -> None:
    """A raw export is mounted like an image; what a guest wrote into an overlay stays there."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    overlay = tmp_path / "vm.qed"
    expected = bytes(MIB) + b"\1" * 65536 + bytes(3 * MIB - 65536)
    with served(tmp_path / "server", "data", "data=@1048576 1*65536", "size=4M") as url:
        for options in (["-r"], ["-o", "snapshot"]):
            with mounted(url, mountpoint, *options):
                assert (mountpoint / "export.raw").read_bytes() == expected
        for written in (b"one", b"two"):
            with mounted(url, mountpoint, "-o", f"overlay={overlay}"):
                disk = mountpoint / "export.raw"
                with disk.open("r+b") as file:
                    file.write(written)
                assert disk.read_bytes() == written + expected[3:]
        assert qemu.content(overlay) == b"two" + expected[3:]
        with qedfuse.open(url) as opened:
            assert opened.read() == expected
    # The name in the header is raw for ever, whatever the export begins with later.
    assert qemu.info(overlay)["backing-filename-format"] == "raw"


def test_an_export_of_another_size_is_refused(tmp_path: Path) -> None:
    """An overlay is not opened over an export whose size is not that of its base."""
    overlay = tmp_path / "vm.qed"
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with (
        served(tmp_path / "server", "memory", "4M") as url,
        mounted(url, mountpoint, "-o", f"overlay={overlay}"),
    ):
        pass
    with served(tmp_path / "server", "memory", "8M") as url:
        line = refused("-o", f"overlay={overlay}", url, mountpoint, code=17)
        assert "found size 8388608, expected size 4194304" in line


def test_a_web_server_behind_nbdkit(golden: Path, tmp_path: Path) -> None:
    """The plugin curl of nbdkit makes an export of a file on a web server."""
    if reason := why_no_nginx():
        pytest.skip(f"nginx: {reason}")
    with serving_nginx(tmp_path / "web") as web:
        shutil.copy(golden, web.directory / "golden.qed")
        with served(tmp_path / "server", "curl", f"{web.http}/golden.qed") as url:
            assert qedimg("compare", url, golden) == "Images are identical.\n"


def test_a_backing_url_needs_a_prefix(golden: Path, tmp_path: Path) -> None:
    """A header may name an export only below an allowed prefix; the line names the prefix."""
    overlay = tmp_path / "vm.qed"
    with served(tmp_path / "server", "file", golden) as url:
        qedimg("create", "-b", url, overlay)
        line = qedimg("map", overlay, code=17)
        assert line == (
            f"qedimg: {overlay}: backing file {url}: refused: found a URL, expected a local file "
            f"(allow it with backing_url={url})\n"
        )
        assert "0x100000" in qedimg("map", "--backing-url", url, overlay)


def test_a_server_that_cannot_be_used_is_one_line(golden: Path, tmp_path: Path) -> None:
    """No server, a closed port, a missing export, TLS that the server lacks: a line and a code."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    gone = f"nbd+unix:///?socket={tmp_path}/gone"
    assert qedimg("info", gone, code=22) == f"qedimg: {gone}: No such file or directory\n"
    assert "Connection refused" in qedimg("info", "nbd://localhost:1/x", code=22)
    assert refused("-r", gone, mountpoint, code=22) == f"{gone}: No such file or directory"
    if not why_no_server("qemu-nbd"):
        with serving_nbd(tmp_path, "qemu-nbd", "-r", "-f", "raw", "-x", "one", golden):
            line = qedimg("info", f"nbd+unix:///other?socket={tmp_path}/socket", code=26)
        assert "found no such export" in line
        assert line.count("\n") == 1
    with served(tmp_path / "server", "file", golden) as url:
        line = qedimg("info", url.replace("nbd+unix", "nbds+unix"), code=27)
    assert "found that the server refuses TLS" in line


def test_an_export_that_is_shorter_than_its_image_is_refused(golden: Path, tmp_path: Path) -> None:
    """An export that ends inside the tables is an invalid image, not a disk of zeros."""
    short = tmp_path / "short.qed"
    shutil.copy(golden, short)
    with short.open("r+b") as file:
        file.truncate(70000)
    with served(tmp_path / "server", "file", short) as url:
        line = qedimg("info", url, code=0)
        assert "l1_table_offset" in line or "L1" in line
        qedimg("convert", "-O", "raw", url, tmp_path / "copy.raw", code=12)


def test_what_cannot_be_done_is_refused(golden: Path, tmp_path: Path) -> None:
    """A writable mount, a repair, a resize and warm are usage errors."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with served(tmp_path / "server", "file", golden) as url:
        assert "expected -r" in refused(url, mountpoint, code=1)
        for words in (["check", "-r", "all", url], ["resize", url, "1G"], ["warm", url]):
            line = qedimg(*words, code=1)
            assert line.startswith(f"qedimg: {url}: found")
            assert line.count("\n") == 1
