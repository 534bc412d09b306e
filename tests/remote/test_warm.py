"""``qedimg warm``: what it fetches, and that it fetches nothing twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.cli.qedimg.main import main
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import CacheError, RemoteError
from qedfuse.remote import cachedirectory
from qedfuse.remote.cachedirectory import CacheDirectory
from qedfuse.remote.options import Deadlines, RemoteOptions
from qedfuse.remote.unitfile import UNIT_BYTES
from qedfuse.tools.copying.warm import warm
from tests.support import qemu
from tests.support.remotes import opened, read, some_bytes
from tests.support.webserver import serving, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.nginx import Nginx

MIB = 1 << 20


def options(cache: Path) -> OpenOptions:
    """Return options with a cache, and a server that is given up soon."""
    return OpenOptions(
        remote=RemoteOptions(cache_directory=str(cache), deadlines=Deadlines(1, 1, 1))
    )


def make_image(path: Path) -> Path:
    """Make an image with data, a range that was discarded, and data again."""
    qemu.create(path, 64 * MIB)
    raw = path.with_suffix(".raw")
    raw.write_bytes(some_bytes(24))
    qemu.io(path, f"write -s {raw} 0 6M")
    qemu.io(path, f"write -s {raw} 40M 6M")
    raw.unlink()
    return path


async def test_image_is_read_without_the_server(tmp_path: Path) -> None:
    """After a warm-up all of an image is read from the cache, and no byte was fetched twice."""
    image = make_image(tmp_path / "disk.qed")
    content = await trio.Path(image).read_bytes()
    with serving(content) as server:
        calls: list[tuple[int, int]] = []
        found = await warm(
            server.url,
            options(tmp_path / "cache"),
            progress=lambda done, total: calls.append((done, total)),
        )
        assert [file.is_complete for file in found] == [True]
        assert found[0].cached_bytes == found[0].fetched_bytes == len(content)
        # Each request to open the object is for its first byte.
        assert sum(last > first for first, last in server.requests) >= 3
        fetched = [(first, last) for first, last in server.requests if last > first]
        assert sum(last - first + 1 for first, last in fetched) == len(content)
        assert calls == sorted(calls)
        assert calls[-1] == (len(content), len(content))
        requests = len(fetched)
        again = await warm(server.url, options(tmp_path / "cache"))
        assert again[0].fetched_bytes == 0
        assert again[0].cached_bytes == len(content)
        assert len([first for first, last in server.requests if last > first]) == requests
        url = server.url
    with pytest.raises(RemoteError):
        await warm(url.replace("disk", "other"), options(tmp_path / "cache"))


@pytest.mark.expect_log("found damaged metadata")
def test_what_cannot_be_recorded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If the cache cannot record what it has, `warm` says why, and promises nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with serving(some_bytes(2)) as server:
        assert main(["warm", server.url]) == 0
        assert capsys.readouterr().out.endswith(
            "bytes in the cache, fetched now: 524288, no server is needed to read it\n"
        )
        (about,) = tmp_path.glob("qedfuse/object-*/version-*/about.json")
        about.write_bytes(b"{")
        with monkeypatch.context() as patch:
            # As if another program had damaged the file after the opening.
            patch.setattr(cachedirectory, "repair_metadata", lambda *_: None)
            assert main(["warm", server.url]) == 0
        assert capsys.readouterr().out.endswith("bytes in the cache, fetched now: 0\n")
        (record,) = caplog.records
        assert record.getMessage() == (
            f"{about.parent}: about.json: found damaged metadata, expected those of the "
            "entry (the next opening writes them again); not recorded as usable without a server"
        )
        assert main(["warm", server.url]) == 0
        assert capsys.readouterr().out.endswith(", no server is needed to read it\n")


@pytest.mark.expect_log("reading it from the cache")
async def test_clusters_that_are_free_are_not_fetched(tmp_path: Path) -> None:
    """Only tables and allocated clusters are fetched, and they suffice without the server."""
    image = make_image(tmp_path / "disk.qed")
    async with open_disk(str(image), OpenOptions(writable=True, compact="off")) as disk:
        await disk.discard(0, 6 * MIB)
    content = await trio.Path(image).read_bytes()
    with serving(content) as server:
        found = await warm(server.url, options(tmp_path / "cache"))
        assert found[0].is_complete
        assert 6 * MIB < found[0].cached_bytes < len(content) - 5 * MIB
        assert server.sent_bytes - found[0].fetched_bytes == 1  # opened once
    cached = tmp_path / "cache"
    assert sum(path.stat().st_blocks * 512 for path in cached.rglob("data")) < len(content) - MIB
    async with (
        open_disk(server.url, options(cached)) as disk,
        open_disk(str(image), OpenOptions()) as local,
    ):
        assert await disk.read(0, disk.size) == await local.read(0, local.size)


@pytest.mark.expect_log("reading it from the cache")
@pytest.mark.parametrize("name", ["disk.qed", "disk.raw"])
@pytest.mark.parametrize("command", ["warm", "convert", "compare"])
def test_one_warning_without_the_server(
    name: str, command: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A command opens its URL once, so it warns once if it reads the cache."""
    image = tmp_path / name
    if name == "disk.qed":
        make_image(image)
    else:
        image.write_bytes(some_bytes(3))
    words = ["--cache-dir", str(tmp_path / "cache")]
    with serving(image.read_bytes()) as server:
        assert main(["warm", "-q", *words, server.url]) == 0
    caplog.clear()
    others = {"warm": [], "convert": [str(tmp_path / "new.qed")], "compare": [str(image)]}[command]
    words += ["-q", "--remote-timeout", "1"]
    assert main([command, *words, server.url, *others]) == 0
    assert len(caplog.messages) == 1


async def test_interrupted_call_goes_on(tmp_path: Path) -> None:
    """What a cancelled call has fetched is not fetched again by the next."""
    content = some_bytes(120.5)
    with serving(content) as server:
        with trio.CancelScope() as scope:

            def on_progress(done: int, total: int) -> None:
                if done > total // 2:
                    scope.cancel()

            await warm(server.url, options(tmp_path / "cache"), progress=on_progress)
        assert scope.cancelled_caught
        first = server.sent_bytes
        assert len(content) // 2 < first
        found = await warm(server.url, options(tmp_path / "cache"))
        assert found[0].is_complete
        # A request that was running when the call was cancelled may have been in vain.
        assert found[0].fetched_bytes <= len(content) // 2 + 2 * UNIT_BYTES
        assert server.sent_bytes <= len(content) + 32 * UNIT_BYTES


@pytest.mark.usefixtures("bare_environment")
def test_chain_of_urls(nginx: Nginx, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bases that --backing-url allows are fetched as well; others are refused."""
    base = make_image(nginx.directory / "base.qed")
    raw = nginx.directory / "lowest.raw"
    raw.write_bytes(some_bytes(10))
    top = nginx.directory / "top.qed"
    qemu.create(tmp_path / "top.qed", 64 * MIB)
    qemu.io(tmp_path / "top.qed", "write -P 1 0 1M")
    for path, name in ((tmp_path / "top.qed", "base.qed"), (base, "lowest.raw")):
        words = ["-u", "-b", f"{nginx.http}/{name}", "-F", "raw" if "raw" in name else "qed"]
        assert main(["rebase", *words, str(path)]) == 0
    (tmp_path / "top.qed").rename(top)
    cache = tmp_path / "cache"
    words = ["warm", "--cache-dir", str(cache), f"{nginx.http}/top.qed"]
    assert main(words) == 17
    capsys.readouterr()
    assert main([*words, "--backing-url", f"{nginx.http}/"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        f"{nginx.http}/{name}" for name in ("top.qed", "base.qed", "lowest.raw")
    ]
    size = raw.stat().st_size
    assert lines[2].endswith(
        f": {size} bytes in the cache, fetched now: {size}, no server is needed to read it"
    )
    # Each file is opened with one request for its first byte, and no byte is fetched twice.
    for name, fetched in zip(("top.qed", "base.qed", "lowest.raw"), lines, strict=True):
        answers = nginx.requests(f"/{name}")
        assert answers.count((206, 1)) == (2 if name == "top.qed" else 1)  # it was refused before
        sent = sum(length for _, length in answers if length > 1)
        assert f": {sent} bytes in the cache, " in fetched
    with opened(f"{nginx.http}/lowest.raw", cache) as file:
        assert read(file, 0, size) == raw.read_bytes()
        assert file.fetcher.fetched_bytes == 0


@pytest.mark.parametrize("name", ["disk.qed", "disk.raw"])
def test_limit_of_the_cache_that_is_too_low(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the needed data exceeds the limit, no data is fetched: one line, and exit code 1."""
    image = tmp_path / name
    if name == "disk.qed":
        make_image(image)
    else:
        image.write_bytes(some_bytes(40))
    words = ["--cache-dir", str(tmp_path / "cache"), "--remote-cache-size", "4M"]
    with serving(image.read_bytes()) as server:
        assert main(["warm", *words, server.url]) == 1
        captured = capsys.readouterr()
        size = image.stat().st_size
        assert captured.out == ""
        assert captured.err == (
            f"qedimg: {server.url}: found {size} bytes to keep in the cache, expected at most "
            f"{4 << 20} (the limit of its size)\n"
        )
        assert server.sent_bytes < 4 * MIB
        words[-1] = "64M"
        assert main(["warm", "-q", *words, server.url]) == 0
    assert main(["warm", "--remote-cache-size", "4k", "https://example.org/x"]) == 1
    assert "found 4k, expected at least 1M" in capsys.readouterr().err


@pytest.mark.expect_log("cannot store in the cache")
async def test_cache_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that cannot keep the file is an error, and not a warm-up without effect."""
    room = [10 * UNIT_BYTES]
    monkeypatch.setattr(CacheDirectory, "evict", lambda *_: room.pop() if room else 0)
    with (
        serving(some_bytes(40)) as server,
        pytest.raises(CacheError, match="found no space in the cache, expected space for all"),
    ):
        await warm(server.url, options(tmp_path / "cache"))
    assert not room


@pytest.mark.expect_log("the cache was damaged; going on without it")
async def test_cache_that_is_cut_meanwhile(tmp_path: Path) -> None:
    """If another program truncates the file of the cache, the error does not speak of space."""

    def cut(_done: int, _total: int) -> None:
        for data in (tmp_path / "cache").rglob("data"):
            os.truncate(data, 0)

    with serving(some_bytes(80)) as server:
        with pytest.raises(
            CacheError, match="found the file of the cache truncated by another program"
        ):
            await warm(server.url, options(tmp_path / "cache"), progress=cut)
        assert (await warm(server.url, options(tmp_path / "cache")))[0].is_complete


@pytest.mark.expect_log("going on without a cache")
async def test_no_directory_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a directory nothing is fetched, and the error is not about space."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with (
        serving(some_bytes(3)) as server,
        pytest.raises(CacheError, match="found no cache to fetch it into, expected a directory"),
    ):
        await warm(server.url)
    assert server.sent_bytes < UNIT_BYTES * 2


def test_interruption_by_a_signal(tmp_path: Path) -> None:
    """Ctrl-C ends the command with exit code 130; the next command fetches the rest only."""
    content = some_bytes(120)
    command = [sys.executable, "-m", "qedfuse.cli.qedimg", "warm", "-p"]
    command += ["--cache-dir", str(tmp_path / "cache")]
    patience = ("--remote-timeout", "600", "--remote-attempt-timeout", "600")
    with serving(content) as server:
        server.healthy = 20
        server.always = "silence"
        process = subprocess.Popen(
            [*command, *patience, server.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: server.struck["silence"])
        process.send_signal(signal.SIGINT)
        out, log = process.communicate(timeout=60)
        assert process.returncode == 130
        assert out == ""
        lines = log.splitlines()
        assert lines[0] == "Fetching: 0.0 %"
        assert lines[-1] == "qedimg: interrupted"
        assert all(line.startswith("Fetching: ") for line in lines[:-1])
        assert server.sent_bytes > 40 * UNIT_BYTES
        server.always = None
        done = subprocess.run([*command, server.url], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(f"{server.url}: {len(content)} bytes in the cache, fetched")
        assert "Fetching: 100.0 %" in done.stderr
        # What the server had sent last may not have been stored: at most 4 requests of 1 MiB.
        assert server.sent_bytes < len(content) + 17 * UNIT_BYTES


def test_server_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that fails in between gives one line and an exit code."""
    with serving(some_bytes(20)) as server:
        words = ["warm", "--cache-dir", str(tmp_path / "cache"), "--remote-timeout", "1"]
        assert main([*words, server.url]) == 0
        server.always = "status 404"
        assert main(["warm", "--cache-dir", str(tmp_path / "other"), server.url]) == 26
        assert server.struck["status 404"]
    captured = capsys.readouterr()
    assert captured.err == f"qedimg: {server.url}: found no such object\n"
    assert main(["warm", os.devnull]) == 1
    assert "found a path, expected a URL" in capsys.readouterr().err
