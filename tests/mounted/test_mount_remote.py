"""Mounts of images on a web server: reads, overlays, outages, and objects that change."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.remote.unitfile import UNIT_BYTES
from tests.support import programs, qemu
from tests.support.extensions import needs_extensions
from tests.support.keyservice import giving_keys
from tests.support.mounted import TIMEOUT, FrontMount, clean_up, front, mounted, qedfuse, refused
from tests.support.openfiles import open_files
from tests.support.programs import environment
from tests.support.webserver import PATIENCE, Fault, WebServer, serving, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

DISK_BYTES = 8 << 20
BLOCK = 4096
MAX_UMOUNT_SECONDS = 60.0
"""Within this time the mount of the test ends, although the machine is busy.  Its reads fail after
9 seconds, so it would take 72 seconds if each of its 8 batches of writes waited for that long."""
FAR = 6 << 20
"""Offset in the disk of data that no test reads before its fault."""


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """Give an image with data in several places; the rest is unallocated."""
    path = tmp_path / "golden.qed"
    qemu.create(path, DISK_BYTES)
    data = tmp_path / "data"
    data.write_bytes(random.Random(5).randbytes(3 << 20))
    qemu.io(path, f"write -s {data} 0 3M", f"write -s {data} {FAR} 1M")
    return path


@pytest.fixture
def content(golden: Path, tmp_path: Path) -> bytes:
    """Give the content of the disk."""
    raw = tmp_path / "golden.raw"
    qemu.run("qemu-img", "convert", "-O", "raw", golden, raw)
    return raw.read_bytes()


@pytest.fixture
def server(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """Serve the image, with an empty cache for those who read it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(golden.read_bytes()) as server:
        yield server


def prefix(server: WebServer) -> str:
    """Return the option that allows the server's objects as backing files."""
    return f"backing_url=http://127.0.0.1:{server.port}/images"


def read(path: Path, offset: int, length: int = BLOCK) -> bytes:
    """Read a range with one call, without read-ahead of the kernel."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def drop(path: Path) -> None:
    """Remove a file that no program changes from the kernel's page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def write(path: Path, offset: int, data: bytes) -> None:
    """Write a range durably."""
    fd = os.open(path, os.O_WRONLY)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


def check(image: Path) -> None:
    """Assert that ``qedimg check`` finds nothing."""
    done = programs.run("qedimg", "check", image, timeout=TIMEOUT)
    assert done.returncode == 0, done


def stop(mount: FrontMount) -> list[str]:
    """End an idle mount by a signal; return the lines of its log."""
    mount.signal(signal.SIGTERM)
    code, log = mount.finish()
    assert code == 0, log
    return log.splitlines()


def test_a_read_only_mount_shows_the_image(
    server: WebServer, content: bytes, tmp_path: Path
) -> None:
    """The disk of a URL has its last name, is read-only, and equals the disk of the image."""
    url = server.url + "?signature=secret"
    with mounted(url, tmp_path / "mnt", "-r") as directory:
        assert [path.name for path in directory.iterdir()] == ["disk.raw"]
        disk = directory / "disk.raw"
        assert read(disk, FAR + BLOCK) == content[FAR + BLOCK : FAR + 2 * BLOCK]
        assert disk.read_bytes() == content
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            disk.open("r+b")
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
        assert f"{server.url}?... " in table
        assert "secret" not in table
    assert server.requests


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/images/my%20disk.qed", "my disk.raw"),
        ("/images/%C3%A4.img?x=1", "ä.img.raw"),
    ],
)
def test_names_in_urls_are_decoded(
    server: WebServer, source: str, name: str, tmp_path: Path
) -> None:
    """The name of a disk has no escapes of the URL and no query."""
    url = f"http://127.0.0.1:{server.port}{source}"
    with mounted(url, tmp_path / "mnt", "-r") as directory:
        assert [path.name for path in directory.iterdir()] == [name]


def test_a_writable_mount_is_refused(server: WebServer, golden: Path, mnt: Path) -> None:
    """A mount that would write to a URL is refused with a line that says what to give instead."""
    expected = "found a URL in a mount that can be written to, expected -r, -o snapshot or -o"
    assert expected in refused(server.url, mnt, code=1)
    assert expected in refused(golden, server.url, mnt, code=1)
    assert server.requests == []


def test_a_snapshot_takes_writes(server: WebServer, content: bytes, tmp_path: Path) -> None:
    """With -o snapshot a disk can be written to, and the writes are gone after the mount."""
    for _ in range(2):
        with mounted(server.url + "?secret", tmp_path / "mnt", "-o", "snapshot") as directory:
            disk = directory / "disk.raw"
            assert disk.read_bytes() == content
            write(disk, FAR - 100, b"new" * 100)
            assert disk.read_bytes() == content[: FAR - 100] + b"new" * 100 + content[FAR + 200 :]


def test_an_overlay_keeps_writes(server: WebServer, content: bytes, tmp_path: Path) -> None:
    """An overlay over a URL stores its URL, keeps the writes, and can be mounted by itself."""
    overlay, mnt = tmp_path / "vm1.qed", tmp_path / "mnt"
    expected = content[:1000] + b"new" * 100 + content[1300:]
    with mounted(server.url, mnt, "-o", f"overlay={overlay}") as directory:
        write(directory / "disk.raw", 1000, b"new" * 100)
        assert (directory / "disk.raw").read_bytes() == expected
    assert server.url.encode() in overlay.read_bytes()[:4096]
    check(overlay)
    with mounted(server.url, mnt, "-o", f"overlay={overlay}") as directory:
        assert (directory / "disk.raw").read_bytes() == expected
    line = refused(overlay, mnt, code=17)
    assert "found a URL, expected a local file (allow it with backing_url=" in line
    with mounted(overlay, mnt, "-o", prefix(server)) as directory:
        assert (directory / "vm1.raw").read_bytes() == expected
        write(directory / "vm1.raw", DISK_BYTES - 100, b"end" * 10)
    check(overlay)


def test_a_server_that_refuses_the_base_is_the_reason(server: WebServer, tmp_path: Path) -> None:
    """A base that may not be read has the code of a refusal, and no advice about the overlay."""
    overlay, mnt = tmp_path / "vm1.qed", tmp_path / "mnt"
    with mounted(server.url, mnt, "-o", f"overlay={overlay}"):
        pass
    server.always = "status 403"
    new_cache = f"cache_dir={tmp_path / 'new'}"
    line = refused(overlay, mnt, "-o", prefix(server), "-o", new_cache, code=27)
    assert "found HTTP status 403" in line
    assert "-o ro" not in line


def test_overlays_of_other_images_are_refused(
    server: WebServer, golden: Path, tmp_path: Path
) -> None:
    """An overlay over another image than the URL, and a URL that is a secret, are refused."""
    overlay, mnt = tmp_path / "vm1.qed", tmp_path / "mnt"
    with mounted(golden, mnt, "-o", f"overlay={overlay}"):
        pass
    option = f"overlay={overlay}"
    line = refused(server.url, mnt, "-o", option, code=1)
    assert line == f"overlay {overlay}: found backing file {golden}, expected {server.url}"
    line = refused(server.url + "?token=secret", mnt, "-o", option, code=1)
    assert "found a URL with a query" in line
    assert "secret" not in line


def test_an_outage_fails_only_what_is_not_cached(
    server: WebServer, content: bytes, tmp_path: Path
) -> None:
    """While the server fails, cached data is read, the rest gets EIO; then all works again."""
    options = "remote_timeout=0.5,remote_attempt_timeout=0.5"
    with front("-r", "-o", options, server.url, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "disk.raw"
        assert read(disk, 0) == content[:BLOCK]
        server.always = "status 503"
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                read(disk, FAR)
            assert read(disk, 2 * BLOCK) == content[2 * BLOCK : 3 * BLOCK]
        assert server.struck["status 503"] > 0
        server.always = None
        assert read(disk, FAR) == content[FAR : FAR + BLOCK]
        assert disk.read_bytes() == content
        first, *rest = stop(mount)
        assert first.startswith(f"qedfuse: {server.url}: found HTTP status 503 (attempts: ")
        assert first.endswith("); what is not in the cache cannot be read")
        assert rest == [
            f"qedfuse: {server.url}: answers again",
            f"qedfuse: {mount.mountpoint}: unmounted; the images are closed",
        ]


def test_a_write_that_needs_the_server_is_lost_with_a_message(
    server: WebServer, content: bytes, tmp_path: Path
) -> None:
    """In an outage, writes of parts of new clusters fail, which the log and the exit code say.

    Writes of allocated clusters and of whole clusters succeed.
    """
    overlay = tmp_path / "vm1.qed"
    options = f"overlay={overlay},remote_timeout=0.5,remote_attempt_timeout=0.5"
    new = b"n" * BLOCK
    with front("-o", options, server.url, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "disk.raw"
        write(disk, 0, new)
        server.always = "status 503"
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                write(disk, FAR, new)
        assert server.struck["status 503"] > 0
        write(disk, BLOCK, new)
        write(disk, 1 << 20, b"w" * (1 << 16))
        server.always = None
        write(disk, FAR + BLOCK, new)
        mount.signal(signal.SIGTERM)
        code, log = mount.finish()
    lines = log.splitlines()
    lost = "data that a program has written is lost, because the rest of its cluster cannot be read"
    assert any(line.startswith(f"qedfuse: {overlay}: {lost}: {server.url}: ") for line in lines)
    assert lines[-1] == (
        f"qedfuse: {mount.mountpoint}: data that programs have written to {overlay} was lost, "
        "because the base under it could not be read"
    )
    assert code == 2
    check(overlay)
    with mounted(overlay, tmp_path / "mnt", "-o", prefix(server)) as directory:
        expected = bytearray(content)
        expected[: 2 * BLOCK] = 2 * new
        expected[FAR + BLOCK : FAR + 2 * BLOCK] = new
        expected[1 << 20 : (1 << 20) + (1 << 16)] = b"w" * (1 << 16)
        assert (directory / "vm1.raw").read_bytes() == expected


@needs_extensions
@pytest.mark.parametrize("how", ["beside O_DIRECT", "memory map"])
def test_a_write_from_the_cache_is_recognised(
    how: str, server: WebServer, content: bytes, tmp_path: Path
) -> None:
    """A cached write is reported as lost, also if the kernel sends it with a handle of O_DIRECT.

    So is a change through a memory map without the write-back cache.
    """
    overlay = tmp_path / "vm1.qed"
    # A cluster is longer than what one read puts into the cache.
    words = ("create", "-q", "--cluster-size=1M", "-b", server.url)
    assert programs.qedimg(*words, overlay) == (0, "", "")
    options = f"{prefix(server)},remote_timeout=0.5,remote_attempt_timeout=0.5"
    if how == "memory map":
        options += ",truncate=zero"
    with front("-o", options, overlay, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "vm1.raw"
        fd = os.open(disk, os.O_RDWR)
        if how == "memory map":
            # With a page fault the kernel would wait for the server, which is in this process.
            assert read(disk, FAR) == content[FAR : FAR + BLOCK]
            server.always = "status 503"
            with mmap.mmap(fd, BLOCK, offset=FAR) as pages:
                pages[:] = b"n" * BLOCK
        else:
            server.always = "status 503"
            os.pwrite(fd, b"n" * BLOCK, FAR)
            direct = os.open(disk, os.O_WRONLY | os.O_DIRECT)
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                os.fsync(fd)
            os.close(direct)
        with suppress(OSError):  # EIO, if the kernel has not reported the loss yet
            os.close(fd)
        server.always = None
        mount.signal(signal.SIGTERM)
        code, log = mount.finish()
    assert code == 2
    assert f"data that programs have written to {overlay} was lost" in log.splitlines()[-1]


SPREAD: Final = 1 << 16
"""The size of a cluster of the overlay: each write of the next test goes to another one."""
SPREAD_BYTES: Final = 32 << 20
"""The size of its disk, so there are 512 writes; the kernel sends at most 64 at a time."""


@pytest.fixture
def spread(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[WebServer, bytes]]:
    """Serve an image with data in all clusters; give the server and the content of the disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    golden, data = tmp_path / "spread.qed", tmp_path / "data"
    qemu.create(golden, SPREAD_BYTES)
    data.write_bytes(content * (SPREAD_BYTES // len(content)))
    qemu.io(golden, f"write -s {data} 0 {SPREAD_BYTES}")
    with serving(golden.read_bytes()) as server:
        yield server, data.read_bytes()


def count_written(found: bytes, old: bytes, new: bytes) -> int:
    """Assert that each cluster is as before or as after a write; return how many are as after."""
    written = 0
    for at in range(0, SPREAD_BYTES - SPREAD, SPREAD):
        cluster, before = found[at : at + SPREAD], old[at : at + SPREAD]
        if cluster != before:
            assert cluster == before[: 2 * BLOCK] + new + before[3 * BLOCK :]
            written += 1
    return written


@pytest.mark.parametrize(
    ("end", "fault"), [("umount", "silence"), ("umount", "status 503"), ("signals", "silence")]
)
def test_umount_with_dirty_pages_and_a_failing_server(
    end: str, fault: Fault, spread: tuple[WebServer, bytes], tmp_path: Path
) -> None:
    """Dirty pages whose clusters need a server that fails delay the end of a mount once, not each.

    What needs no server is written by umount, the rest is reported, and the image is consistent.
    """
    server, old = spread
    overlay, new, whole = tmp_path / "vm1.qed", b"n" * BLOCK, b"w" * SPREAD
    options = f"overlay={overlay},remote_timeout=6,remote_attempt_timeout=1"
    with front("-o", options, server.url, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "disk.raw"
        assert read(disk, 0) == old[:BLOCK]  # the cache has the tables now, and the first unit
        fd = os.open(disk, os.O_WRONLY)
        os.pwrite(fd, whole, SPREAD_BYTES - SPREAD)
        for at in range(0, SPREAD_BYTES - SPREAD, SPREAD):
            os.pwrite(fd, new, at + 2 * BLOCK)
        server.always, server.heads_fail = fault, True
        begin = time.monotonic()
        if end == "umount":
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                os.close(fd)
            done = qedfuse("umount", mount.mountpoint)
            assert (done.returncode, "was lost" in done.stderr) == (2, True), done
        else:
            for _ in range(2):  # the disk is open, so the first signal does not end the mount
                mount.signal(signal.SIGTERM)
                mount.read_line()
        code, log = mount.finish()
        assert time.monotonic() - begin < MAX_UMOUNT_SECONDS
        assert code == 2, log
        if end == "signals":
            with suppress(OSError):
                os.close(fd)
    assert server.struck[fault] >= 2
    server.always = None
    check(overlay)
    qemu.run("qemu-img", "check", "-f", "qed", overlay)
    with mounted(overlay, tmp_path / "mnt", "-o", prefix(server)) as directory:
        found = (directory / "vm1.raw").read_bytes()
    # The second signal limits the end, and the kernel may send this write last.
    if end == "umount":
        assert found[SPREAD_BYTES - SPREAD :] == whole
    assert 0 < count_written(found, old, new) < SPREAD_BYTES // SPREAD - 1


def test_writes_to_a_slow_server_after_a_failure(
    spread: tuple[WebServer, bytes], tmp_path: Path
) -> None:
    """A write that fails costs no further write, if the server answers again, but slowly."""
    server, old = spread
    overlay, new = tmp_path / "vm1.qed", b"n" * BLOCK
    with front("-o", f"overlay={overlay}", server.url, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "disk.raw"
        assert read(disk, 0) == old[:BLOCK]  # the cache has the tables now
        server.always = "status 403"
        with pytest.raises(OSError, match=os.strerror(errno.EACCES)):
            write(disk, SPREAD_BYTES // 2 + 2 * BLOCK, new)
        assert server.struck["status 403"]
        server.always, server.delay_seconds = None, 1.0
        fd = os.open(disk, os.O_WRONLY)
        places = range(0, SPREAD_BYTES - SPREAD, UNIT_BYTES)  # each write has a request of its own
        for at in places:
            os.pwrite(fd, new, at + 2 * BLOCK)
        os.fsync(fd)
        os.close(fd)
        mount.signal(signal.SIGTERM)
        code, log = mount.finish()
        assert code == 2, log  # the first write was lost
    server.delay_seconds = 0
    with mounted(overlay, tmp_path / "mnt", "-o", prefix(server)) as directory:
        found = (directory / "vm1.raw").read_bytes()
    assert count_written(found, old, new) == len(places)


def epolls(pid: int) -> int:
    """Return how many epoll instances a process has."""
    return list(open_files(pid).values()).count("anon_inode:[eventpoll]")


def is_idle(pid: int) -> bool:
    """Return whether the event loop of a process sleeps, so all its tasks have begun to wait."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0] == "S"


def test_only_a_mount_of_a_url_waits_for_the_end_of_the_connection(
    server: WebServer, golden: Path, content: bytes, tmp_path: Path
) -> None:
    """A mount of local files has one epoll, that of the event loop; one of a URL has another."""
    for source, name, expected in ((golden, "golden.raw", 1), (server.url, "disk.raw", 2)):
        with front("-r", source, tmp_path / "mnt") as mount:
            assert read(mount.mountpoint / name, FAR) == content[FAR : FAR + BLOCK]
            wait_until(lambda: is_idle(mount.process.pid))
            assert epolls(mount.process.pid) == expected
            stop(mount)


def test_a_changed_object_is_stale(server: WebServer, content: bytes, tmp_path: Path) -> None:
    """When the object changes, cached data of its old version is read, the rest gets ESTALE."""
    with front("-r", server.url, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "disk.raw"
        assert read(disk, 0) == content[:BLOCK]
        server.content = bytes(len(server.content))
        server.etag = '"two"'
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
                read(disk, FAR)
        assert read(disk, 2 * BLOCK) == content[2 * BLOCK : 3 * BLOCK]
        log = stop(mount)
        assert len(log) == 2, "\n".join(log)


def test_a_removed_object_is_stale(server: WebServer, content: bytes, tmp_path: Path) -> None:
    """When the object is removed, what is not cached gets ESTALE, as if it had changed."""
    with front("-r", server.url, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "disk.raw"
        assert read(disk, 0) == content[:BLOCK]
        server.always = "status 404"
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
            read(disk, FAR)
        assert server.struck["status 404"] > 0
        assert "no such object any more" in stop(mount)[0]


def test_a_stuck_request_delays_no_end(server: WebServer, tmp_path: Path) -> None:
    """While a read waits for a silent server, a forced end of the mount fails the read."""
    with front("-o", f"ro,{PATIENCE}", server.url, tmp_path / "mnt") as mount:
        server.always = "silence"
        reader = subprocess.Popen(
            [sys.executable, "-c", "import sys; open(sys.argv[1], 'rb').read()",
             mount.mountpoint / "disk.raw"],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(lambda: server.struck["silence"])
        mount.signal(signal.SIGTERM)
        assert "still in use" in mount.read_line()
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0
        assert reader.wait(60) == 1


def test_a_stuck_read_ahead_delays_no_end(server: WebServer, tmp_path: Path) -> None:
    """After the last close, ``qedfuse umount`` does not wait for read-ahead that is stuck."""
    with front("-o", f"ro,{PATIENCE}", server.url, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "disk.raw"
        fd = os.open(disk, os.O_RDONLY)
        server.always = "silence"
        os.posix_fadvise(fd, FAR, 1 << 18, os.POSIX_FADV_WILLNEED)
        wait_until(lambda: server.struck["silence"])
        os.close(fd)
        assert qedfuse("umount", mount.mountpoint).returncode == 0
        assert mount.finish()[0] == 0


def test_a_silent_server_delays_no_interruption(server: WebServer, mnt: Path) -> None:
    """Ctrl-C ends a mount that waits for the server, before anything is mounted."""
    server.always = "silence"
    process = subprocess.Popen(
        [sys.executable, "-m", "qedfuse", *("-o", f"ro,{PATIENCE}"), server.url, mnt],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    wait_until(lambda: server.struck["silence"])
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 130, log
    clean_up(mnt)


def test_a_complete_entry_needs_no_server(
    server: WebServer, content: bytes, tmp_path: Path
) -> None:
    """An object whose content is all in the cache is mounted while its server fails."""
    cache = tmp_path / "chosen"
    options = f"remote_timeout=0.5,cache_dir={cache},remote_cache_size=1G"
    with mounted(server.url, tmp_path / "mnt", "-r", "-o", options) as directory:
        assert (directory / "disk.raw").read_bytes() == content
    assert any(cache.iterdir())
    assert not (tmp_path / "cache").exists()
    server.always = "status 503"
    with front("-r", "-o", options, server.url, tmp_path / "mnt") as mount:
        assert "reading it from the cache" in mount.read_line()
        assert (mount.mountpoint / "disk.raw").read_bytes() == content
    assert server.struck["status 503"] > 0


STOPS_IN_STORE: Final = """
import os
import signal
from qedfuse.remote import unitfile
write_all = unitfile.write_all
def stop(fd, offset, parts):
    data = b"".join(parts)
    if offset <= {at} < offset + len(data):
        write_all(fd, offset, (data[: int(len(data) * {fraction})],))
        os.kill(os.getpid(), signal.SIGSTOP)
    write_all(fd, offset, parts)
unitfile.write_all = stop
"""
"""Stops a mount while it stores the byte ``at`` of the object in the cache.

The fraction of the data that ``fraction`` states is written, and the checksums are not.
"""


@pytest.mark.parametrize("fraction", [0, 0.5, 1])
def test_a_mount_that_is_killed_while_two_fill_one_entry(
    fraction: float, server: WebServer, content: bytes, tmp_path: Path
) -> None:
    """The other mount reads the right bytes before and after, and a third one all from the cache.

    The mount that is killed was storing units that the other one stores as well.
    """
    options = ("-r", "-o", f"cache_dir={tmp_path / 'shared'}")
    at = server.content.rindex(content[FAR : FAR + BLOCK])
    prelude = STOPS_IN_STORE.format(at=at, fraction=fraction)
    with front(*options, server.url, tmp_path / "mnt") as mount:
        disk = mount.mountpoint / "disk.raw"
        assert read(disk, 0) == content[:BLOCK]
        with (
            ThreadPoolExecutor(1) as pool,
            # The sandbox would refuse the signal that the mount sends to itself.
            front(
                *(*options, "-o", "sandbox=off", server.url, tmp_path / "killed"), prelude=prelude
            ) as killed,
        ):
            status = Path(f"/proc/{killed.process.pid}/stat")
            reading = pool.submit(read, killed.mountpoint / "disk.raw", FAR)
            wait_until(lambda: status.read_text().rpartition(") ")[2][0] == "T")
            assert disk.read_bytes() == content
            killed.signal(signal.SIGKILL)
            with pytest.raises(OSError, match=r"."):
                reading.result(60)
        drop(disk)
        assert disk.read_bytes() == content
        sent = server.sent_bytes
        with mounted(server.url, tmp_path / "third", *options) as directory:
            assert (directory / "disk.raw").read_bytes() == content
        assert server.sent_bytes - sent < 16  # the question for the version, a byte each
    assert len(list((tmp_path / "shared").glob("object-*/version-*"))) == 1


def test_credentials_of_others_are_refused(server: WebServer, tmp_path: Path, mnt: Path) -> None:
    """A file with credentials that others can read, or with another form, is refused."""
    secrets = tmp_path / "secrets"
    secrets.write_text("# a comment\n\nAWS_SECRET=hush\n")
    secrets.chmod(0o640)
    line = refused(server.url, mnt, "-r", "-o", f"credentials={secrets}", code=1)
    assert "found permissions 0640, expected none for the group" in line
    secrets.chmod(0o600)
    with mounted(server.url, mnt, "-r", "-o", f"credentials={secrets}"):
        pass
    secrets.write_text("AWS_SECRET=hush\nhush hush\n")
    line = refused(server.url, mnt, "-r", "-o", f"credentials={secrets}", code=1)
    assert line == f"{secrets}: credentials: line 2: found another form, expected NAME=VALUE"
    secrets.unlink()
    assert "cannot open" in refused(server.url, mnt, "-r", "-o", f"credentials={secrets}", code=2)


@pytest.mark.parametrize("cloud", ["Amazon", "Google"])
def test_the_sandbox_lets_the_key_of_a_role_be_renewed(
    cloud: str,
    server: WebServer,
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mount in its sandbox fetches another key when that of its role has expired."""
    with giving_keys() as service:
        service.lifetime_seconds = -5
        token = tmp_path / "tokens" / "token"
        token.parent.mkdir()
        token.write_text("first")
        if cloud == "Amazon":
            url, before = "s3://images/disk.qed", "Credential=KEY"
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
            monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{service.url}/key")
            monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(token))
        else:
            url, before = "gs://images/disk.qed", "Bearer bearer-"
            monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{server.port}")
            for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP"):
                monkeypatch.setenv(name, f"127.0.0.1:{service.port}")
        with front("-r", url, tmp_path / "mnt") as mount:
            mount.wait_for_sandbox()
            keys, asked = service.keys, len(server.authorizations)
            token.unlink()
            token.write_text("second")
            disk = mount.mountpoint / "disk.raw"
            assert read(disk, FAR) == content[FAR : FAR + BLOCK]
            # Requests that began earlier may arrive at any time, with an earlier key.
            later = [text.partition(before)[2] for text in server.authorizations[asked:]]
            assert max(int(text.partition("/")[0]) for text in later) > keys > 0
            if cloud == "Amazon":
                assert "second" in service.header("authorization")
            stop(mount)


@pytest.mark.parametrize("linked", [False, True])
def test_the_sandbox_lets_the_key_of_amazons_tools_be_replaced(
    server: WebServer,
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    linked: bool,
) -> None:
    """A mount whose key is refused reads the present one in ``~/.aws/credentials``."""
    lines = "[default]\naws_access_key_id = {}\naws_secret_access_key = secret\n"
    directory = tmp_path / "home" / ".aws"
    directory.mkdir(parents=True)
    file = tmp_path / "elsewhere" / "keys" if linked else directory / "credentials"
    if linked:
        file.parent.mkdir()
        (directory / "credentials").symlink_to(file)
    file.write_text(lines.format("KEY1"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    server.required = "Credential=KEY1/"
    with front("-r", "s3://images/disk.qed", tmp_path / "mnt") as mount:
        mount.wait_for_sandbox()
        file.unlink()
        file.write_text(lines.format("KEY2"))
        server.required = "Credential=KEY2/"
        assert read(mount.mountpoint / "disk.raw", FAR) == content[FAR : FAR + BLOCK]
        stop(mount)
    assert all("Credential=" in text for text in server.authorizations)


@pytest.mark.parametrize("is_linked", [False, True])
def test_the_sandbox_lets_the_file_of_credentials_be_replaced(
    server: WebServer, content: bytes, tmp_path: Path, *, is_linked: bool
) -> None:
    """A mount whose key is refused reads the present one in the file, also through links.

    The links are those of a volume with secrets in Kubernetes, and one that leads there.
    """
    line = f"AWS_ENDPOINT_URL=http://127.0.0.1:{server.port}\nAWS_SECRET_ACCESS_KEY=secret\n"
    named, volume = tmp_path / "named", tmp_path / "volume"
    for directory in (named, volume):
        directory.mkdir()
    for number in (1, 2):
        file = volume / f"version{number}" / "key"
        file.parent.mkdir()
        file.touch(0o600)
        file.write_text(f"{line}AWS_ACCESS_KEY_ID=KEY{number}\n")
    (volume / "now").symlink_to("version1")
    (volume / "key").symlink_to("now/key")
    secrets = named / "key"
    if is_linked:
        secrets.symlink_to(volume / "key")
    else:
        (volume / "version1" / "key").rename(secrets)
    server.required = "Credential=KEY1/"
    words = ("-r", "-o", f"credentials={secrets}", "s3://images/disk.qed")
    with front(*words, tmp_path / "mnt") as mount:
        mount.wait_for_sandbox()
        if is_linked:
            (volume / "new").symlink_to("version2")
            (volume / "new").rename(volume / "now")
        else:
            (volume / "version2" / "key").rename(secrets)
        server.required = "Credential=KEY2/"
        assert read(mount.mountpoint / "disk.raw", FAR) == content[FAR : FAR + BLOCK]
        stop(mount)


def test_an_overlay_remembers_its_base(
    server: WebServer, content: bytes, tmp_path: Path, mnt: Path
) -> None:
    """An overlay is refused over another version of its base, until ``base_changed`` is given."""
    overlay = tmp_path / "vm1.qed"
    url = f"http://127.0.0.1:{server.port}/images/disk.qed"
    with mounted(server.url, mnt, "-o", f"overlay={overlay}") as directory:
        write(directory / "disk.raw", 1000, b"new" * 100)
    server.etag = '"two"'
    size = len(server.content)
    expected = (
        f'{overlay}: backing file {url}: found size {size} and etag "two", expected size {size} '
        'and etag "one", which the image remembers; no cache has all of the expected version '
        "(base_changed accepts the version found)"
    )
    for words in ((server.url, "-o", f"overlay={overlay}"), (overlay, "-o", prefix(server))):
        assert refused(*words, mnt, code=17) == expected
    assert refused(overlay, mnt, "-r", "-o", prefix(server), code=17) == expected
    # A read-only mount accepts the new base, but remembers nothing.
    with mounted(overlay, mnt, "-r", "-o", prefix(server) + ",base_changed") as directory:
        assert read(directory / "vm1.raw", 0) == content[:1000] + b"new" * 100 + content[1300:BLOCK]
    assert refused(overlay, mnt, "-o", prefix(server), code=17) == expected
    with mounted(overlay, mnt, "-o", prefix(server) + ",base_changed"):
        pass
    with mounted(overlay, mnt, "-o", prefix(server)):
        pass


def test_a_changed_local_base_is_logged(golden: Path, tmp_path: Path) -> None:
    """An overlay over a local base that has changed is mounted, with one warning."""
    overlay, mnt = tmp_path / "vm1.qed", tmp_path / "mnt"
    with mounted(golden, mnt, "-o", f"overlay={overlay}"):
        pass
    with mounted(overlay, mnt):
        pass
    qemu.io(golden, "write -P 7 0 64k")
    expected = f"qedfuse: {overlay}: backing file {golden}: found it modified since"
    for options, is_logged in ((("-r",), True), ((), True), ((), False)):
        with front(*options, overlay, mnt) as mount:
            log = stop(mount)
        assert log[0].startswith(expected) is is_logged, log
    qemu.io(golden, "write -P 8 0 64k")
    for words in (["-o", "base_changed"], []):
        with front(*words, overlay, mnt) as mount:
            log = stop(mount)
        assert not log[0].startswith(expected), log
