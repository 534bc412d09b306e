"""Overlays over files on servers: each remembers the versions that it was made over."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.cli.qedimg.main import main
from qedfuse.disk.opening import open_disk
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import BackingError, CacheError, ObjectChangedError, RemoteError
from qedfuse.remote.address import parse_prefix
from qedfuse.remote.cachedirectory import CacheDirectory
from qedfuse.remote.options import Deadlines, RemoteOptions
from tests.support import qemu
from tests.support.disks import pattern
from tests.support.webserver import WebServer, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 1 << 20
RECORD = ".vm.qed.qedfuse-base"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebServer]:
    """Serve an image without a base."""
    path = qemu.create(tmp_path / "golden", SIZE)
    qemu.io(path, "write -P 7 0 128k")
    content = path.read_bytes()
    path.unlink()
    with serving(content) as state:
        yield state


@pytest.fixture(params=["attribute", "file"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give where the record is: an attribute, or a file where the host has no attributes."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    if request.param == "file":
        for name in ("getxattr", "setxattr", "removexattr"):
            monkeypatch.setattr(os, name, refuse)
    return str(request.param)


@pytest.fixture(autouse=True)
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the path of the overlay.

    The cache of the test has a directory and room of its own, and is never used without a server.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(CacheDirectory, "evict", lambda *_: 1 << 30)
    monkeypatch.setattr(CacheDirectory, "offline_entries", lambda *_: iter(()))
    (tmp_path / "images").mkdir()
    return tmp_path / "images" / "vm.qed"


def options(
    server: WebServer, *, writable: bool = False, accept: bool = False, seconds: float = 20.0
) -> OpenOptions:
    """Return options that allow the bases on the server."""
    allowed = (parse_prefix(f"http://127.0.0.1:{server.port}/"),)
    return OpenOptions(
        writable=writable,
        backing=BackingPolicy(base_changed=accept),
        remote=RemoteOptions(allowed=allowed, deadlines=Deadlines.limited(5.0, 10.0, seconds)),
    )


def first_bytes(path: Path, chosen: OpenOptions) -> bytes:
    """Open an image, return its first bytes, and close it."""

    async def read() -> bytes:
        async with open_disk(str(path), chosen) as disk:
            return bytes(await disk.read(0, 4))

    return trio.run(read)


def is_refused(path: Path, server: WebServer, base: str | None = None) -> bool:
    """Return whether an image is refused because its base has changed; assert that both opens do.

    ``base`` is the base that the message names; None for the object of the server.
    """
    lines = []
    for writable in (False, True):
        try:
            first_bytes(path, options(server, writable=writable))
        except BackingError as error:
            lines.append(str(error))
    if not lines:
        return False
    line, again = lines
    size = len(server.content)
    assert line == again
    assert line.startswith(f"{path}: backing file {base or server.url}: found size {size} ")
    assert line.endswith(
        ", which the image remembers; no cache has all of the expected version "
        "(base_changed accepts the version found)"
    )
    return True


def run(*words: object, code: int = 0) -> None:
    """Run qedimg."""
    assert main([str(word) for word in words]) == code


def prefix(server: WebServer) -> tuple[str, str]:
    """Return the option of qedimg that allows the bases on the server."""
    return "--backing-url", f"http://127.0.0.1:{server.port}/"


def make_source(path: Path) -> Path:
    """Make a raw disk that is longer than the base of the server and differs from it."""
    path.write_bytes(pattern(2 * SIZE, 5))
    return path


@pytest.mark.parametrize("how", ["create", "convert", "rebase", "opened"])
def test_the_version_that_it_was_made_over(
    server: WebServer, image: Path, place: str, how: str
) -> None:
    """An overlay is refused over another version than that at its creation, or its rebase."""
    if how == "create":
        run("create", "-b", server.url, image)
    elif how == "convert":
        source = make_source(image.with_name("source"))
        run("convert", "-B", server.url, "-F", "qed", "-f", "raw", source, image)
    elif how == "rebase":
        run("create", image, SIZE)
        run("rebase", "-b", server.url, *prefix(server), image)
    else:
        run("create", "-u", "-F", "qed", "-b", server.url, image, SIZE)
        assert not is_refused(image, server)
    assert (image.with_name(RECORD)).exists() is (place == "file")
    server.etag = '"two"'
    assert is_refused(image, server)
    server.etag = '"one"'
    assert not is_refused(image, server)
    server.etag = '"three"'
    first_bytes(image, options(server, accept=True))
    assert is_refused(image, server)
    first_bytes(image, options(server, accept=True, writable=True))
    assert not is_refused(image, server)
    server.content += bytes(512)
    assert is_refused(image, server)
    # After the rebase no base is remembered, and nothing of a record is left.
    run("rebase", "-u", "-b", "", image)
    assert not image.with_name(RECORD).exists()
    assert os.listxattr(image) == []


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("how", ["create", "convert"])
def test_what_remains_of_an_earlier_image(server: WebServer, image: Path, how: str) -> None:
    """An image that replaces another one remembers its own base, and not that of the other."""
    run("create", "-b", server.url, image)
    server.etag = '"two"'
    if how == "create":
        run("create", "--force", "-b", server.url, image)
    else:
        source = make_source(image.with_name("source"))
        words = ("-B", server.url, "-F", "qed", "-f", "raw")
        run("convert", "--force", *words, source, image)
    assert not is_refused(image, server)
    run("create", "--force", image, SIZE)
    assert os.listxattr(image) == []
    assert not image.with_name(RECORD).exists()


def unpinned(server: WebServer, *, accept: bool = False) -> OpenOptions:
    """Return options to open an overlay for writing over a base without a validator."""
    chosen = options(server, writable=True, accept=accept)
    return replace(chosen, remote=replace(chosen.remote, allow_unpinned=True))


def test_a_server_that_gives_no_validator_for_a_while(server: WebServer, image: Path) -> None:
    """A base without a validator is not the version that has one, although its size is the same.

    The refused open does not replace the version that is remembered.
    """
    run("create", "-b", server.url, image)
    etag, server.etag, modified, server.modified = server.etag, "", server.modified, None
    size = len(server.content)
    with pytest.raises(BackingError, match=f"found size {size}, expected size {size} and etag"):
        first_bytes(image, unpinned(server))
    server.etag = '"two"'
    assert is_refused(image, server)
    server.etag, server.modified = etag, modified
    assert not is_refused(image, server)


def test_a_server_that_gives_a_validator_later(server: WebServer, image: Path) -> None:
    """An overlay over a base without a validator is refused over one that has a validator."""
    etag, server.etag, modified, server.modified = server.etag, "", server.modified, None
    run("create", "-u", "-F", "qed", "-b", server.url, image, SIZE)
    assert first_bytes(image, unpinned(server)) == b"\7" * 4
    assert first_bytes(image, unpinned(server)) == b"\7" * 4
    server.etag, server.modified = etag, modified
    assert is_refused(image, server)
    assert first_bytes(image, unpinned(server, accept=True)) == b"\7" * 4
    assert not is_refused(image, server)


def test_a_url_below_a_local_base(server: WebServer, image: Path, place: str) -> None:
    """An overlay remembers a base on a server below its own base."""
    middle = image.with_name("middle.qed")
    run("create", "-u", "-F", "qed", "-b", server.url, middle, SIZE)
    run("create", "-b", "middle.qed", image)
    assert not is_refused(image, server)
    assert image.with_name(RECORD).exists() is (place == "file")
    server.etag = '"two"'
    assert is_refused(image, server)
    # The base in between has no record of its own: it has not been opened for writing.
    first_bytes(middle, options(server))
    run("commit", *prefix(server), image, code=17)


def test_a_commit_keeps_the_urls(server: WebServer, image: Path, place: str) -> None:
    """After a commit to the base, the versions of the bases on servers below it are remembered."""
    run("create", "-u", "-F", "qed", "-b", server.url, image.with_name("middle.qed"), SIZE)
    run("create", "-b", "middle.qed", image)
    assert not is_refused(image, server)
    run("commit", *prefix(server), image)
    # Only the record of the overlay is left to notice the change.
    middle = image.with_name("middle.qed")
    if place == "attribute":
        os.removexattr(middle, "user.qedfuse.base")
    else:
        middle.with_name(".middle.qed.qedfuse-base").unlink()
    server.etag = '"two"'
    assert is_refused(image, server)


def test_another_url_below_a_local_base(
    server: WebServer, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If the base was rebased to another object, the overlay is not refused."""
    middle = image.with_name("middle.qed")
    server.others["/other.qed"] = server.content
    run("create", "-u", "-F", "qed", "-b", server.url, middle, SIZE)
    run("create", "-b", "middle.qed", image)
    assert not is_refused(image, server)
    status = middle.stat()
    other = f"http://127.0.0.1:{server.port}/other.qed"
    run("rebase", "-b", other, *prefix(server), middle)
    os.utime(middle, ns=(status.st_atime_ns, status.st_mtime_ns))
    server.etag = '"two"'
    run("rebase", "-u", "-F", "qed", "-b", other, middle)
    os.utime(middle, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not is_refused(image, server)
    server.etag = '"three"'
    assert is_refused(image, server, base=other)
    assert not caplog.messages


@pytest.mark.expect_log("cannot remember the version of the backing file")
@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("place", ["file"], indirect=True)
def test_a_foreign_file_in_the_way(
    server: WebServer, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that has the name of the record is not changed, and the overlay can still be used."""
    other = image.with_name(RECORD)
    other.write_bytes(b"mine")
    run("create", "-b", server.url, image)
    assert first_bytes(image, options(server, writable=True)) == b"\7" * 4
    assert other.read_bytes() == b"mine"
    line = f"{other}: found another file, expected none, or a record of qedfuse"
    expected = f"{image}: cannot remember the version of the backing file: {line}"
    assert caplog.messages == [expected, expected]


@pytest.mark.expect_log("cannot read the version of the backing file that was remembered")
@pytest.mark.expect_log("cannot remember the version of the backing file")
def test_a_host_that_refuses(
    server: WebServer,
    image: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the host refuses to read or to store the record, this is logged, and the image opens."""
    run("create", "-b", server.url, image)

    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    for call in ("getxattr", "setxattr"):
        monkeypatch.setattr(os, call, refuse)
    assert first_bytes(image, options(server, writable=True)) == b"\7" * 4
    assert first_bytes(image, options(server, writable=True, accept=True)) == b"\7" * 4
    lines = [line.rpartition(": ") for line in caplog.messages]
    what = [line[0].removeprefix(f"{image}: ").split()[1] for line in lines]
    assert what == ["read", "read", "remember"]
    assert [line[2] for line in lines] == ["Permission denied"] * 3


def test_another_format_than_the_user_states(
    server: WebServer, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A QED image on a server is refused as the base if the user states another format."""
    run("create", "-b", server.url, "-F", "vmdk", image, code=17)
    assert "found a QED image, expected the format vmdk" in capsys.readouterr().err


@pytest.mark.expect_log("cannot read the version of the backing file that was remembered")
def test_a_record_that_cannot_be_read_stays(
    server: WebServer, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure to read the record does not make the image remember another version."""
    run("create", "-b", server.url, image)
    server.etag = '"two"'

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "getxattr", refuse)
        assert first_bytes(image, options(server, writable=True)) == b"\7" * 4
    assert is_refused(image, server)


@pytest.mark.parametrize(
    ("fault", "code", "number"),
    [("status 503", 22, errno.EIO), ("status 404", 26, errno.ENOENT)],
)
def test_an_outage_is_no_fault_of_the_image(
    server: WebServer,
    image: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    code: int,
    number: int,
) -> None:
    """A base that the server does not serve has the error of the server, and names the image."""
    run("create", "-u", "-F", "qed", "-b", server.url, image, SIZE)
    server.always = fault  # type: ignore[assignment]
    with pytest.raises(RemoteError) as caught:
        first_bytes(image, options(server, seconds=0.5))
    assert type(caught.value) is RemoteError
    assert caught.value.errno == number
    expected = f"{image}: backing file {server.url}: "
    assert str(caught.value).startswith(expected)
    timeout = ("--remote-timeout", "0.5")
    source = make_source(image.with_name("source"))
    new = image.with_name("new.qed")
    local = image.with_name("local.qed")
    run("create", local, SIZE)
    commands: list[tuple[object, ...]] = [
        ("map", *prefix(server), image),
        ("create", "-b", server.url, new),
        ("convert", "-B", server.url, "-F", "qed", "-f", "raw", source, new),
        ("convert", "-B", server.url, "-F", "raw", "-f", "raw", source, new),
        ("rebase", "-b", server.url, *prefix(server), local),
    ]
    struck = server.struck[fault]
    for name, *words in commands:
        capsys.readouterr()
        run(name, *timeout, *words, code=code)
        line = capsys.readouterr().err
        shown = {"map": image, "rebase": local}.get(str(name), new)
        assert line.startswith(f"qedimg: {shown}: backing file {server.url}: "), line
        assert line.count("\n") == 1
        assert not new.exists()
        assert server.struck[fault] > struck
        struck = server.struck[fault]


@pytest.mark.expect_log("found no such object any more")
def test_a_base_that_goes_away_while_it_is_opened(server: WebServer, image: Path) -> None:
    """A base that is removed during the opening of an overlay has an error of its own kind."""
    run("create", "-u", "-F", "qed", "-b", server.url, image, SIZE)
    server.healthy, server.always = 1, "status 404"
    with pytest.raises(ObjectChangedError) as caught:
        first_bytes(image, options(server))
    assert (caught.value.errno, caught.value.exit_code) == (errno.ESTALE, 23)
    assert str(caught.value).startswith(f"{image}: backing file {server.url}: found no such ")
    assert server.struck["status 404"]


def test_an_unusable_cache_is_no_fault_of_the_image(server: WebServer, image: Path) -> None:
    """A base that cannot be opened because of the cache has the error of the cache."""
    run("create", "-u", "-F", "qed", "-b", server.url, image, SIZE)
    chosen = options(server)
    remote = RemoteOptions(allowed=chosen.remote.allowed, cache_directory=str(image))
    with pytest.raises(CacheError, match=f"^{image}: backing file "):
        first_bytes(image, OpenOptions(remote=remote))


def test_qemu_does_not_mind(server: WebServer, image: Path, place: str) -> None:
    """QEMU checks, describes, reads and rebases an image with a record as one without."""
    base = image.with_name("base.qed")
    base.write_bytes(server.content)
    for name in ("vm.qed", "plain.qed"):
        run("create", "-b", "base.qed", image.with_name(name))
    plain = image.with_name("plain.qed")
    if place == "attribute":
        os.removexattr(plain, "user.qedfuse.base")
        assert os.listxattr(image) == ["user.qedfuse.base"]
    for path in (image, plain):
        qemu.io(path, "write -P 9 64k 64k")
        assert qemu.check(path).code == 0
    assert image.read_bytes() == plain.read_bytes()
    assert qemu.content(image) == qemu.content(plain)
    for path in (image, plain):
        qemu.run("qemu-img", "rebase", "-b", "", path)
        assert qemu.check(path).code == 0
    assert image.read_bytes() == plain.read_bytes()
