"""A golden image in an object store, with a file system in it, from publishing to its disasters.

The store is OpenStack Swift.  nginx, in front of it, gives the same objects by https.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.support import programs, qemu
from tests.support.devices import file_system, loop_device, run
from tests.support.mounted import COMMAND, TIMEOUT, front, mounted, refused
from tests.support.nginx import serving_front, why_no_nginx
from tests.support.users import USER_ID, as_user, user_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.swift import Swift

MIB = 1 << 20
DISK_BYTES = 64 * MIB
FAR = 40 * MIB
"""Offset in the disk of data that no test reads before its fault."""
HAS_HTTPS = any(Path("/usr/lib").glob("*/qemu/block-curl.so"))
"""Whether QEMU can read by https."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has loop devices and users")


class Golden(NamedTuple):
    """The published image.

    Attributes:
        content: The content of its disk.
        url: Its URL in the store.
        https: Its URL in nginx.
        certificate: The certificate of nginx.
    """

    content: bytes
    url: str
    https: str
    certificate: Path


def qedimg(*words: str | Path) -> str:
    """Run the toolbox, which must succeed without a message; return what it prints."""
    done = programs.run("qedimg", *words, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.fixture(scope="module")
def front_door(
    swift: Swift, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """Give the URL of the public bucket in nginx, and nginx's certificate."""
    if reason := why_no_nginx():
        pytest.skip(f"nginx: {reason}")
    swift.request("POST", "golden", None, {"X-Container-Read": ".r:*"})
    with serving_front(tmp_path_factory.mktemp("front") / "web", swift.endpoint) as (url, path):
        yield f"{url}/v1/AUTH_test/golden", path


@pytest.fixture
def golden(
    store: Swift, front_door: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Golden:
    """Publish an image with ext4, a file and some random data; the machine's cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    raw, image, tree = tmp_path / "golden.raw", tmp_path / "golden.qed", tmp_path / "tree"
    tree.mkdir()
    (tree / "release").write_text("golden\n", encoding="utf-8")
    (tree / "data").write_bytes(random.Random(3).randbytes(20 * MIB))
    with raw.open("wb") as file:
        file.truncate(DISK_BYTES)
    run("mkfs.ext4", "-q", "-d", tree, raw)
    with raw.open("r+b") as file:
        file.seek(FAR)
        block = file.read(MIB)
    if not any(block):
        # Something to read where the file system has nothing.
        with raw.open("r+b") as file:
            file.seek(FAR)
            file.write(random.Random(4).randbytes(MIB))
    qedimg("convert", "-O", "qed", raw, image)
    key = f"{tmp_path.name}/golden.qed"
    url = f"s3://golden/{key}"
    line = qedimg("publish", image, url)
    assert "qedfuse -o overlay=" in line
    assert url in line
    assert key in store.keys("golden")
    content = raw.read_bytes()
    raw.unlink()
    image.unlink()
    return Golden(content, url, f"{front_door[0]}/{key}", front_door[1])


def read(path: Path, offset: int, length: int = 4096) -> bytes:
    """Read a range with one call, without read-ahead of the kernel."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


@pytest.mark.skipif(not HAS_HTTPS, reason="QEMU without https (Debian: qemu-block-extra)")
def test_two_users_have_machines_of_their_own(golden: Golden, tmp_path: Path) -> None:
    """Two users mount overlays over one object, each changes the file system in its own.

    Root reads by the store's own protocol and has a loop device, the other user by https.
    Both file systems are clean, and QEMU reads both disks as their mounts show them.
    """
    mine = tmp_path / "mine.qed"
    with (
        user_directory() as home,
        mounted(golden.url, tmp_path / "mnt", "-o", f"overlay={mine}") as directory,
    ):
        theirs, mnt = home / "theirs.qed", home / "mnt"
        variables = {"SSL_CERT_FILE": str(home / "ca.pem"), "XDG_CACHE_HOME": str(home / "cache")}
        shutil.copy(golden.certificate, home / "ca.pem")
        (home / "cache").mkdir()
        os.chown(home / "cache", USER_ID, USER_ID)

        def user(*words: str | Path) -> str:
            done = as_user(*words, variables=variables)
            assert done.returncode == 0, done
            return done.stdout

        user(*COMMAND, "-o", f"overlay={theirs}", golden.https, mnt)
        with loop_device(directory / "golden.raw") as device:
            with file_system(device, tmp_path / "root") as root:
                assert (root / "release").read_text("utf-8") == "golden\n"
                (root / "release").write_text("mine\n", encoding="utf-8")
                assert (root / "data").read_bytes() == random.Random(3).randbytes(20 * MIB)
            run("e2fsck", "-fn", device)
        disk = mnt / "golden.raw"
        (home / "new").write_text("theirs\n", encoding="utf-8")
        user("debugfs", "-w", "-R", "rm release", disk)
        user("debugfs", "-w", "-R", f"write {home}/new release", disk)
        user("e2fsck", "-fn", disk)
        user(*COMMAND, "umount", mnt)
        # A second mount, because the kernel had cached what was written through the first.
        user(*COMMAND, "-o", f"overlay={theirs}", golden.https, mnt)
        user("cp", disk, home / "seen.raw")
        user(*COMMAND, "umount", mnt)
        seen = (home / "seen.raw").read_bytes()
        shutil.copy(theirs, tmp_path / "theirs.qed")
        assert (home / "cache/qedfuse").stat().st_uid == USER_ID
    contents = {}
    for name, text in (("mine", "mine\n"), ("theirs", "theirs\n")):
        overlay, raw = tmp_path / f"{name}.qed", tmp_path / f"{name}.raw"
        contents[name] = qemu.content_over_url(overlay, golden.https)
        raw.write_bytes(contents[name])
        assert run("debugfs", "-R", "cat release", raw) == text
        run("e2fsck", "-fn", raw)
        qedimg("check", overlay)
    assert seen == contents["theirs"]
    with mounted(golden.url, tmp_path / "mnt", "-o", f"overlay={mine}") as directory:
        assert (directory / "golden.raw").read_bytes() == contents["mine"]
    with mounted(golden.url, tmp_path / "mnt", "-r") as directory:
        assert (directory / "golden.raw").read_bytes() == golden.content


def test_an_outage_of_the_store(store: Swift, golden: Golden, tmp_path: Path) -> None:
    """While the store is stopped, cached reads go on and others get EIO; then all works again."""
    options = "remote_timeout=2,remote_attempt_timeout=1"
    with front("-r", "-o", options, golden.url, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "golden.raw"
        assert read(disk, 0, 65536) == golden.content[:65536]
        with store.stopped():
            begin = time.monotonic()
            for _ in range(2):
                with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                    read(disk, FAR)
                assert read(disk, 65536) == golden.content[65536 : 65536 + 4096]
            assert time.monotonic() - begin < 30
        assert read(disk, FAR) == golden.content[FAR : FAR + 4096]
        assert disk.read_bytes() == golden.content
        run(*COMMAND, "umount", mount.mountpoint)
        code, log = mount.finish()
        assert code == 0
        first, *rest = log.splitlines()
        assert first.startswith(f"qedfuse: {golden.url}: found no answer in time (attempts: ")
        assert rest == [
            f"qedfuse: {golden.url}: answers again",
            f"qedfuse: {mount.mountpoint}: unmounted; the images are closed",
        ]


def test_a_cache_that_is_deleted(golden: Golden, tmp_path: Path) -> None:
    """The cache may be deleted while it is in use: all reads are right, and nothing is logged."""
    cache = tmp_path / "cache"
    with front("-r", golden.url, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "golden.raw"
        assert read(disk, 0, 65536) == golden.content[:65536]
        assert list(cache.rglob("data"))
        shutil.rmtree(cache)
        assert read(disk, 65536) == golden.content[65536 : 65536 + 4096]
        assert disk.read_bytes() == golden.content
        run(*COMMAND, "umount", mount.mountpoint)
        code, log = mount.finish()
        assert (code, log.splitlines()) == (
            0,
            [f"qedfuse: {mount.mountpoint}: unmounted; the images are closed"],
        )
    with mounted(golden.url, tmp_path / "mnt", "-r") as directory:
        assert (directory / "golden.raw").read_bytes() == golden.content
    assert list(cache.rglob("data"))


def test_a_restart_of_the_server(
    store: Swift, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read during a restart of the server waits for its end; nothing fails or is logged."""
    directory = tmp_path / "front"
    path = golden.https.partition("/v1/")[2]
    with ExitStack() as stack:
        with serving_front(directory, store.endpoint) as (url, certificate):
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            mount = stack.enter_context(front("-r", f"{url}/v1/{path}", tmp_path / "mnt"))
            disk = mount.mountpoint / "golden.raw"
            assert read(disk, 0, 65536) == golden.content[:65536]
            port = int(url.rpartition(":")[2])
        pool = stack.enter_context(ThreadPoolExecutor(1))
        with socket.create_server(("127.0.0.1", port)) as refusing:
            reading = pool.submit(read, disk, FAR)
            for _ in range(3):
                refusing.accept()[0].close()
        with serving_front(directory, store.endpoint, port):
            assert reading.result() == golden.content[FAR : FAR + 4096]
            run(*COMMAND, "umount", mount.mountpoint)
            assert mount.finish() == (
                0,
                f"qedfuse: {mount.mountpoint}: unmounted; the images are closed\n",
            )


def test_another_release_under_the_same_name(golden: Golden, tmp_path: Path) -> None:
    """An overlay is refused over another image than its own, and is as it was over its own."""
    overlay, other = tmp_path / "vm.qed", tmp_path / "other.qed"
    with (
        mounted(golden.url, tmp_path / "mnt", "-o", f"overlay={overlay}") as directory,
        (directory / "golden.raw").open("r+b") as disk,
    ):
        disk.write(b"changed")
    content = overlay.read_bytes()
    qemu.create(other, DISK_BYTES)
    qedimg("publish", "--force", other, golden.url)
    line = refused(golden.url, tmp_path / "mnt", "-o", f"overlay={overlay}", code=17)
    assert golden.url in line
    assert overlay.read_bytes() == content
