"""``qedimg publish`` into a real store: what it stores, refuses and leaves behind."""

from __future__ import annotations

import logging
import os
import random
import re
import shlex
import signal
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import obstore
import pytest
import trio
from obstore.exceptions import AlreadyExistsError, GenericError

from qedfuse.cli.qedimg.main import main
from qedfuse.disk.options import OpenOptions
from qedfuse.errors import HostError, ImageInUseError, RemoteError
from qedfuse.remote.address import parse_address
from qedfuse.remote.client import ClientOptions
from qedfuse.remote.options import Deadlines, RemoteOptions
from qedfuse.remote.storeclient import StoreClient
from qedfuse.remote.upload import Upload, Uploaded
from qedfuse.remote.uploadcheck import StoppedError, UploadCheck
from qedfuse.remote.uploadcontent import ContentParts, _in_thread, part_bytes
from qedfuse.remote.uploadwatch import watch_store
from qedfuse.tools.copying.publish import publish
from qedfuse.util.threads import run_in_thread
from tests.support import chains, programs, qemu
from tests.support.mounted import qedfuse
from tests.support.refusedcalls import CLONE3, run_without
from tests.support.webserver import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.object import RemoteObject
    from tests.support.swift import Swift

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Make an image of 20 MiB of data, which is stored in three parts."""
    path = qemu.create(tmp_path / "golden.qed", 32 * MIB)
    raw = tmp_path / "data.raw"
    raw.write_bytes(os.urandom(20 * MIB))
    qemu.io(path, f"write -s {raw} 0 20M")
    raw.unlink()
    return path


def content(store: Swift, path: str) -> bytes:
    """Return an object, as the store's own interface gives it."""
    return store.request("GET", path).body


def parts(store: Swift, key: str) -> list[str]:
    """Return the parts that the store has of an object, and the marks of unfinished uploads."""
    return [name for name in store.keys("golden+segments") if name.startswith(f"{key}/")]


@pytest.fixture(autouse=True)
def drained(store: Swift, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let uploads that fail wait until the store has all parts; the list has their keys.

    The last part, if it is shorter, is sent after all others.
    """
    keys: list[str] = []

    def drain(content: ContentParts) -> None:
        key = parse_address(content._shown).key
        sent = min(len(content.digests), content._size // content.part_bytes)

        def has_parts() -> bool:
            numbers = [name.rpartition("/")[2] for name in parts(store, key)]
            return sum(number.isdigit() for number in numbers) == sent

        wait_until(has_parts, 30)
        keys.append(key)

    monkeypatch.setattr(ContentParts, "_drain", drain)
    return keys


def failed(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int) -> str:
    """Run a publish that fails; return its message, which is one line."""
    assert main(["publish", *map(str, words)]) == code
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1
    return captured.err


def test_published_image_is_the_file(
    store: Swift, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The object has the bytes of the file, and the output says how to use it."""
    assert main(["publish", str(image), "s3://golden/pub/golden image.qed"]) == 1
    capsys.readouterr()
    url = "s3://golden/pub/golden%20image.qed"
    assert main(["publish", str(image), url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{url}: {image.stat().st_size} bytes, compared with the file"
    assert lines[1] == f"qedfuse -o overlay=vm1.qed {url} /mnt/vm1"
    assert content(store, "golden/pub/golden%20image.qed") == image.read_bytes()


@pytest.mark.parametrize("size", [0, 1, 8 * MIB, 8 * MIB + 1, 16 * MIB])
def test_raw_file_of_any_length(store: Swift, tmp_path: Path, size: int) -> None:
    """Files that are empty, one part, just more than one, or whole parts are stored exactly."""
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(size))
    assert main(["publish", "-q", str(path), f"s3://golden/raw-{size}"]) == 0
    assert content(store, f"golden/raw-{size}") == path.read_bytes()


@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="no FUSE")
@pytest.mark.parametrize("kind", ["image", "raw"])
def test_the_commands_that_are_printed(
    store: Swift,
    image: Path,
    tmp_path: Path,
    kind: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commands in the output mount a writable disk with the content of what was published."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = image
    if kind == "raw":
        source = tmp_path / "disk.raw"
        source.write_bytes(os.urandom(3 * MIB))
    url = f"s3://golden/a,b/{tmp_path.name}%20{kind}"
    assert main(["publish", str(source), url]) == 0
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    commands = capsys.readouterr().out.replace("/mnt/vm1", str(mountpoint)).splitlines()[1:]
    for command in commands:
        program, *words = shlex.split(command)
        done = programs.run(program, *words, timeout=60)
        assert done.returncode == 0, done
    try:
        (disk,) = mountpoint.iterdir()
        expected = source.read_bytes() if kind == "raw" else qemu.content(source)
        assert disk.read_bytes() == expected
        with disk.open("r+b") as file:
            file.write(b"written")
    finally:
        done = qedfuse("umount", mountpoint)
        assert done.returncode == 0, done
    assert content(store, f"golden/a,b/{tmp_path.name}%20{kind}") == source.read_bytes()


def test_existing_object_is_kept(
    store: Swift, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An object is replaced with --force only."""
    store.put("golden", "taken.qed", b"precious")
    text = failed(capsys, image, "s3://golden/taken.qed", code=1)
    assert text == (
        "qedimg: s3://golden/taken.qed: found an object, expected none (--force replaces it)\n"
    )
    assert content(store, "golden/taken.qed") == b"precious"
    assert main(["publish", "--force", str(image), "s3://golden/taken.qed"]) == 0
    assert content(store, "golden/taken.qed") == image.read_bytes()


@pytest.mark.usefixtures("store")
async def test_object_that_appears_meanwhile_is_kept(store: Swift, image: Path) -> None:
    """An object that another program stores during the upload is not replaced."""

    def on_progress(done: int, _total: int) -> None:
        if done == image.stat().st_size:
            store.put("golden", "race.qed", b"first")

    with pytest.raises(Exception, match="found an object, expected none"):
        await publish(str(image), "s3://golden/race.qed", progress=on_progress)
    assert content(store, "golden/race.qed") == b"first"


def test_image_that_is_not_fit(
    store: Swift, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An overlay and an image with NEED_CHECK are refused with what to do."""
    overlay = qemu.create(tmp_path / "top.qed", 32 * MIB, backing="golden.qed")
    text = failed(capsys, overlay, "s3://golden/top.qed", code=1)
    assert "found a backing file, expected none (--flatten publishes the chain" in text
    with image.open("r+b") as file:
        file.seek(16)
        file.write(b"\2")
    text = failed(capsys, image, "s3://golden/top.qed", code=1)
    assert "found NEED_CHECK set, expected an image that was closed cleanly (qedimg check " in text
    assert "top.qed" not in store.keys("golden")


def test_image_that_no_machine_can_mount(
    store: Swift, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image whose header is invalid is refused, as by a mount."""
    whole = image.read_bytes()
    for content_of_file, code, expected in (
        (whole[:16] + b"\x10" + whole[17:], 14, "header field features: found unknown"),
        (whole[:4] + b"\1" + whole[5:], 12, "header field cluster_size: found"),
        (whole[:20], 12, "truncated header: found 20 bytes"),
    ):
        image.write_bytes(content_of_file)
        assert expected in failed(capsys, image, "s3://golden/bad.qed", code=code)
    assert "bad.qed" not in store.keys("golden")


def test_flattened_chain(store: Swift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --flatten the object is one image with the content of the chain; no file is left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    top = chains.draw_chain(tmp_path, random.Random(5), "c", 3)
    assert main(["publish", "-q", "--flatten", str(top), "s3://golden/flat.qed"]) == 0
    flat = tmp_path / "flat.qed"
    flat.write_bytes(content(store, "golden/flat.qed"))
    assert "backing-filename" not in qemu.info(flat)
    assert qemu.content(flat) == qemu.content(top)
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("golden.qed", "target: found a path, expected one of s3://BUCKET/KEY"),
        ("https://localhost/golden.qed", "target: found a web server, expected one of s3://"),
        ("nbd://localhost/golden", "target: found an NBD server, expected one of s3://"),
        ("nbd+unix:///golden?socket=/x", "target: found an NBD server, expected one of s3://"),
        ("s3://golden/x?versionId=1", "target: found a version, expected none"),
        ("s3://golden/", "URL path: found no object"),
    ],
)
def test_target_that_is_no_object(
    image: Path, url: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A target that cannot be written to is refused with what was expected."""
    assert expected in failed(capsys, image, url, code=1)


@pytest.mark.usefixtures("store")
def test_store_that_refuses(
    image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing bucket and a wrong secret have the messages and exit code that reads have."""
    short = image.with_name("short.raw")
    short.write_bytes(b"some bytes")
    for path in (image, short):
        text = failed(capsys, path, "s3://no-bucket/x", code=26)
        assert text == "qedimg: s3://no-bucket/x: found no such bucket\n"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "refused: found HTTP status 403" in failed(capsys, image, "s3://golden/x", code=27)


@pytest.mark.expect_log("stopping the upload, for at most 15 s")
@pytest.mark.parametrize("at", ["first", "last"])
async def test_cancelled_upload_leaves_nothing(store: Swift, image: Path, at: str) -> None:
    """A publish that is cancelled, early or late, leaves no object."""
    key = f"cancelled-{at}.qed"
    struck: list[int] = []
    with trio.CancelScope() as scope:
        token = trio.lowlevel.current_trio_token()

        def on_progress(done: int, total: int) -> None:
            if not struck and (done == total or at == "first"):
                struck.append(done)
                token.run_sync_soon(scope.cancel)

        await publish(str(image), f"s3://golden/{key}", progress=on_progress)
    assert scope.cancelled_caught
    assert struck
    assert key not in store.keys("golden")
    assert parts(store, key) == []


@pytest.mark.expect_log("stopping the upload")
@pytest.mark.expect_log("the removal was not confirmed; the store may still have the object")
async def test_a_deletion_without_answer_is_logged(
    store: Swift, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If a complete object cannot be deleted after a cancellation, a warning names it."""
    compare = UploadCheck.compare
    token = trio.lowlevel.current_trio_token()
    scope = trio.CancelScope()

    def cancelled(check: UploadCheck, etag: str) -> str:
        token.run_sync_soon(scope.cancel)
        assert check._stopped.wait(30)
        return compare(check, etag)

    def unanswered(*_arguments: object) -> NoReturn:
        msg = "no answer"
        raise GenericError(msg)

    monkeypatch.setattr(UploadCheck, "compare", cancelled)
    monkeypatch.setattr(obstore, "delete", unanswered)
    with scope:
        await publish(str(image), "s3://golden/stays.qed")
    assert scope.cancelled_caught
    assert "stays.qed" in store.keys("golden")
    _, line = caplog.messages
    assert line.startswith("s3://golden/stays.qed: the removal was not confirmed; the store may ")


STAYS = "the upload was complete, so the object stays in the store"


@pytest.mark.expect_log("stopping the upload")
@pytest.mark.parametrize(
    ("at", "overwrite"),
    [
        ("comparison", False),
        ("end of the comparison", False),
        *(
            pytest.param(at, overwrite, marks=pytest.mark.expect_log(STAYS))
            for at, overwrite in (
                *(("comparison", True), ("end of the comparison", True)),
                *(("end", True), ("end", False)),
            )
        ),
    ],
)
async def test_cancelled_when_the_object_is_complete(
    store: Swift,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    at: str,
    *,
    overwrite: bool,
) -> None:
    """A complete object is deleted or stays; a line says that it stays, and only then."""
    key = f"late-{at.replace(' ', '-')}-{overwrite}.qed"
    compare, run = UploadCheck.compare, Upload.run
    token = trio.lowlevel.current_trio_token()
    scope = trio.CancelScope()

    def cancel(stopped: threading.Event) -> None:
        token.run_sync_soon(scope.cancel)
        assert stopped.wait(30)

    def open_stored(check: UploadCheck) -> RemoteObject:
        found = open_object(check)
        if at == "end of the comparison":  # of this small object nothing else is compared
            cancel(check._stopped)
        return found

    def compared(check: UploadCheck, etag: str) -> str:
        if at == "comparison":
            cancel(check._stopped)
        monkeypatch.setattr(UploadCheck, "open", open_stored)
        try:
            return compare(check, etag)
        finally:
            monkeypatch.setattr(UploadCheck, "open", open_object)

    def ran(upload: Upload) -> Uploaded:
        result = run(upload)
        if at == "end":
            cancel(upload._stopped)
        return result

    open_object = UploadCheck.open
    monkeypatch.setattr(UploadCheck, "compare", compared)
    monkeypatch.setattr(Upload, "run", ran)
    with scope:
        await publish(str(image), f"s3://golden/{key}", overwrite=overwrite)
    assert scope.cancelled_caught
    stays = overwrite or at == "end"
    assert (key in store.keys("golden")) is stays
    lines = [line.removeprefix(f"s3://golden/{key}: ") for line in caplog.messages]
    assert lines[0] == "stopping the upload, for at most 15 s"
    assert lines[1:] == [STAYS] * stays


@pytest.mark.expect_log(STAYS)
async def test_cancelled_after_the_end_of_the_thread(
    store: Swift, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation that arrives when the result is there is reported like one just before."""
    scope = trio.CancelScope()

    async def late(*arguments: Any, **options: Any) -> object:  # noqa: ANN401  as in trio
        result = await run_in_thread(*arguments, **options)
        if "late.qed" in store.keys("golden"):
            scope.cancel()
        return result

    monkeypatch.setattr("qedfuse.tools.copying.publish.run_in_thread", late)
    with scope:
        await publish(str(image), "s3://golden/late.qed")
    assert scope.cancelled_caught
    assert "late.qed" in store.keys("golden")


async def test_cancelled_before_anything_is_sent(
    store: Swift, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first request has no answer, a cancelled publish ends; it stores nothing later."""
    asked, answers, ended = threading.Event(), threading.Event(), threading.Event()
    run, open_stored = Upload.run, UploadCheck.open

    def wait(check: UploadCheck) -> RemoteObject:
        asked.set()
        assert answers.wait(30)
        return open_stored(check)

    def recorded(upload: Upload) -> NoReturn:
        with pytest.raises(StoppedError):
            run(upload)
        ended.set()
        raise StoppedError

    monkeypatch.setattr(UploadCheck, "open", wait)
    monkeypatch.setattr(Upload, "run", recorded)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish, str(image), "s3://golden/never.qed")
        assert await trio.to_thread.run_sync(asked.wait, 30)
        begin = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - begin < 10
    assert not ended.is_set()
    answers.set()
    assert await trio.to_thread.run_sync(ended.wait, 30)
    assert "never.qed" not in store.keys("golden")
    assert parts(store, "never.qed") == []


@pytest.mark.expect_log("s3://golden/outage-")
@pytest.mark.parametrize("returns", [True, False])
async def test_an_outage_during_an_upload(store: Swift, image: Path, *, returns: bool) -> None:
    """A store that answers again gets the rest; otherwise the upload ends, and says what is left.

    Parts that are left are removed when the store answers again while the process exists.
    """
    key = f"outage-{returns}.qed"
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            if returns:
                os.kill(store.object_server, signal.SIGCONT)

    def on_progress(_done: int, _total: int) -> None:
        if not lines:
            os.kill(store.object_server, signal.SIGSTOP)

    handler = Handler()
    logging.getLogger("qedfuse.remote.uploadwatch").addHandler(handler)
    options = OpenOptions(remote=RemoteOptions(deadlines=Deadlines.limited(5.0, 0.3, 1)))
    call = partial(publish, str(image), f"s3://golden/{key}", options=options)
    try:
        if returns:
            await call(progress=on_progress)
            assert content(store, f"golden/{key}") == await trio.Path(image).read_bytes()
        else:
            with pytest.raises(
                RemoteError,
                match=r"found no answer in time \(for 1 s\); the store may still have the object",
            ):
                await call(progress=on_progress)
    finally:
        os.kill(store.object_server, signal.SIGCONT)
        logging.getLogger("qedfuse.remote.uploadwatch").removeHandler(handler)
    expected = "found no answer in time; the upload waits for the store for at most 1 s"
    assert lines[0] == f"s3://golden/{key}: {expected}"
    if not returns:
        await trio.to_thread.run_sync(wait_until, lambda: not parts(store, key))
        assert key not in store.keys("golden")


@pytest.mark.expect_log("https://localhost:1/x: ")
async def test_the_end_of_an_outage_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says that the store does not answer, and one that it answers again.

    If no thread can be started, the store is not asked, and its state stays as it was.
    """
    asked: list[str | None] = ["found HTTP status 503", "found HTTP status 503", "no thread", None]

    def ask(_client: object) -> str | None:
        answer = asked.pop(0)
        if answer == "no thread":
            raise HostError(answer)
        return answer

    monkeypatch.setattr("qedfuse.remote.uploadwatch._ask", ask)
    address = parse_address("https://localhost:1/x")
    steps = iter(range(10))

    def position() -> int:
        if asked:
            return 0
        nursery.cancel_scope.cancel()
        return next(steps)

    deadlines = Deadlines(0.01, 0.01, 60)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_store, address, ClientOptions(), deadlines, position)
    first, last = caplog.messages
    assert first.endswith(
        ": found HTTP status 503; the upload waits for the store for at most 60 s"
    )
    assert last == "https://localhost:1/x: the store answers again"


def test_the_process_waits_for_no_thread() -> None:
    """A request in a thread of its own does not keep a process that ends; its error is raised."""
    threads: list[threading.Thread] = []
    failure = RemoteError("out")

    def fail() -> None:
        threads.append(threading.current_thread())
        raise failure

    with pytest.raises(RemoteError, match="out"):
        _in_thread(fail, "x")
    assert threads[0] is not threading.current_thread()
    assert threads[0].daemon
    with pytest.raises(HostError, match="x: start a thread: Resource temporarily unavailable"):
        run_without(CLONE3, lambda: _in_thread(fail, "x"))
    assert len(threads) == 1


def test_stopped_upload_keeps_what_it_would_replace(
    store: Swift, image: Path, drained: list[str]
) -> None:
    """An upload with --force that is stopped before its end leaves the old object."""
    store.put("golden", "kept.qed", b"old")
    data = image.read_bytes()

    class Content:
        def read_blocking(self, offset: int, view: memoryview) -> int:
            view[:] = data[offset : offset + len(view)]
            return len(view)

    def on_progress(done: int, _total: int) -> None:
        if done == len(data):
            upload.stop()

    upload = Upload(
        parse_address("s3://golden/kept.qed"),
        Content(),
        len(data),
        ClientOptions(),
        overwrite=True,
        progress=on_progress,
    )
    with pytest.raises(StoppedError):
        upload.run()
    assert content(store, "golden/kept.qed") == b"old"
    assert drained == ["kept.qed"]
    assert parts(store, "kept.qed") == []


@pytest.mark.usefixtures("store")
async def test_changed_file_is_not_published(store: Swift, image: Path) -> None:
    """A file that changes during the upload is not published."""

    def on_progress(_done: int, _total: int) -> None:
        os.utime(image)

    with pytest.raises(ImageInUseError, match="found the file changed during the upload"):
        await publish(str(image), "s3://golden/moving.qed", progress=on_progress)
    assert "moving.qed" not in store.keys("golden")


@pytest.fixture
def damaging(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Damage one byte of each upload; the list has the keys of those that were."""
    struck: list[str] = []
    put = obstore.put

    def damaged(handle: Any, key: str, parts: Any, **options: Any) -> Any:  # noqa: ANN401
        def changed() -> Iterator[bytearray]:
            for part in parts:
                if not struck:
                    struck.append(key)
                    part[1000] ^= 1
                yield part

        return put(handle, key, changed(), **options)

    monkeypatch.setattr(obstore, "put", damaged)
    return struck


def test_object_with_other_bytes_is_deleted(
    store: Swift, image: Path, damaging: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """An object that differs from the file is noticed and deleted."""
    text = failed(capsys, image, "s3://golden/damaged.qed", code=22)
    assert damaging == ["damaged.qed"]
    assert "found other bytes stored at 0, expected the content of the file" in text
    assert "damaged.qed" not in store.keys("golden")
    assert parts(store, "damaged.qed") == []


@pytest.mark.parametrize("weak", ["upload", "metadata"])
def test_an_object_with_a_weak_tag_is_not_said_to_be_deleted(
    store: Swift,
    image: Path,
    damaging: list[str],
    weak: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No weak entity tag shows who stored an object that differs: it stays, and the error says so.

    The store gives weak tags for the upload, or for the metadata only.
    """
    put = obstore.put

    def put_weak(*arguments: Any, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        result = put(*arguments, **options)
        return {**result, "e_tag": f"W/{result['e_tag']}"}

    if weak == "upload":
        monkeypatch.setattr(obstore, "put", put_weak)
    else:
        monkeypatch.setattr("qedfuse.remote.storeclient.strong_etag", lambda _: "")
    text = failed(capsys, image, f"s3://golden/weak-{weak}.qed", code=22)
    assert damaging == [f"weak-{weak}.qed"]
    assert text.endswith(
        ": found other bytes stored at 0, expected the content of the file; the store may still "
        "have the object or parts of it\n"
    )
    assert f"weak-{weak}.qed" in store.keys("golden")


class PanicException(BaseException):
    """Stands for the exception of a panic inside obstore."""


def panic(*_: object, **__: object) -> NoReturn:
    """Raise the exception of a panic."""
    raise PanicException


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("size", [MIB, 20 * MIB])
@pytest.mark.parametrize("at", ["obstore.put", "qedfuse.remote.storesettings.S3Store"])
def test_panic_of_the_library(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    size: int,
    at: str,
) -> None:
    """A panic inside obstore while content is sent, or a store is made, is an error of one line."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(size))
    monkeypatch.setattr(at, panic)
    text = failed(capsys, path, f"s3://golden/panic-{size}", code=22)
    assert "found an error inside obstore, expected none" in text


def test_panic_at_a_deletion(
    store: Swift,
    image: Path,
    damaging: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A panic inside obstore while an object is deleted does not hide why it is deleted."""
    monkeypatch.setattr(obstore, "delete", panic)
    text = failed(capsys, image, "s3://golden/undeleted.qed", code=22)
    assert text.endswith(
        ": found other bytes stored at 0, expected the content of the file; the store may still "
        "have the object or parts of it\n"
    )
    assert damaging == ["undeleted.qed"]
    assert "undeleted.qed" in store.keys("golden")


def lose_answers(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[str]:
    """Let the first upload succeed and then raise; the list has its key.

    If the upload is repeated, there is the object.
    """
    struck: list[str] = []
    put = obstore.put

    def failing(handle: Any, key: str, content: Any, **options: Any) -> Any:  # noqa: ANN401
        if struck:
            raise EXISTS
        options["mode"] = "overwrite"  # Swift knows no condition
        put(handle, key, content, **options)
        struck.append(key)
        raise error

    monkeypatch.setattr(obstore, "put", failing)
    return struck


LOST = GenericError("Generic S3 error: Error performing POST http://x - HTTP error: lost")
EXISTS = AlreadyExistsError("Object at location x already exists")


@pytest.mark.parametrize(
    ("size", "words", "error"),
    [(20 * MIB, [], LOST), (20 * MIB, ["--force"], LOST), (MIB, [], EXISTS), (MIB, [], LOST)],
)
def test_lost_answer(
    store: Swift,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    words: list[str],
    error: Exception,
) -> None:
    """If the answer of the store is lost but the object is the file, the command succeeds."""
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(size))
    struck = lose_answers(monkeypatch, error)
    key = f"lost-{size}-{len(words)}-{error is LOST}.raw"
    assert main(["publish", "-q", *words, str(path), f"s3://golden/{key}"]) == 0
    assert struck == [key]
    assert content(store, f"golden/{key}") == path.read_bytes()


def test_lost_answer_and_another_object(
    store: Swift,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If the store has another object, that stays, and the failure is the one of the upload."""
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(MIB))

    def put(*_: object, **__: object) -> None:
        store.put("golden", "other.raw", b"first")
        raise error

    monkeypatch.setattr(obstore, "put", put)
    error: Exception = EXISTS
    text = failed(capsys, path, "s3://golden/other.raw", code=1)
    assert "found an object, expected none (--force replaces it)" in text
    error = LOST
    words = ("--force", "--remote-timeout", "0.5")
    text = failed(capsys, *words, path, "s3://golden/other.raw", code=22)
    assert re.fullmatch(
        r"qedimg: s3://golden/other.raw: HTTP error: lost \(attempts: [2-9]\)\n", text
    )
    assert content(store, "golden/other.raw") == b"first"


@pytest.mark.parametrize("lost", [False, True])
def test_store_that_fails_before_the_comparison(
    store: Swift,
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    lost: bool,
) -> None:
    """An object that was not compared is kept, and the message says so."""
    if lost:
        lose_answers(monkeypatch, LOST)

    def compare(*_: object) -> None:
        msg = "s3://golden/kept: found HTTP status 503 (attempts: 5)"
        raise RemoteError(msg)

    monkeypatch.setattr(UploadCheck, "compare", compare)
    key = f"uncompared-{lost}.qed"
    store.put("golden", key, b"old")
    text = failed(capsys, "--force", image, f"s3://golden/{key}", code=22)
    if lost:
        assert "HTTP error: lost" in text
        assert text.endswith("; the store did not answer whether it has the object nevertheless\n")
    else:
        assert text == (
            "qedimg: s3://golden/kept: found HTTP status 503 (attempts: 5); the object is stored, "
            "but was not compared with the file\n"
        )
    assert content(store, f"golden/{key}") == image.read_bytes()


def test_store_without_known_checksums_is_read(
    store: Swift, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the entity tag is no checksum, the object is read and compared."""
    monkeypatch.setattr(
        "qedfuse.remote.uploadcheck.UploadCheck._expected_etags", lambda _: ("", "")
    )
    assert main(["publish", "-q", str(image), "s3://golden/read.qed"]) == 0
    assert content(store, "golden/read.qed") == image.read_bytes()


@pytest.fixture
def read_parts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """Let stored objects be read; the list has the time limit and length of each part read."""
    get = StoreClient.get
    found: list[tuple[float, int]] = []

    def recorded(client: StoreClient, *arguments: Any) -> Iterator[Buffer]:  # noqa: ANN401
        for part in get(client, *arguments):
            found.append((client._options.attempt_seconds, len(part)))
            yield part

    monkeypatch.setattr(StoreClient, "get", recorded)
    monkeypatch.setattr(UploadCheck, "_expected_etags", lambda _: ("", ""))
    return found


@pytest.mark.usefixtures("store")
def test_comparison_has_the_time_of_an_upload(
    image: Path, read_parts: list[tuple[float, int]]
) -> None:
    """A part is read with a time limit for long responses, not with that of a short request."""
    url = "s3://golden/limit.qed"
    assert main(["publish", "-q", "--remote-attempt-timeout=7", str(image), url]) == 0
    assert {seconds for seconds, _ in read_parts} == {60}
    assert sum(length for _, length in read_parts) == image.stat().st_size


def test_stopped_comparison_ends_within_a_part(
    store: Swift, read_parts: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison that is stopped reads at most a MiB more, and the object is deleted."""
    get = StoreClient.get

    class Content:
        def read_blocking(self, _offset: int, view: memoryview) -> int:
            return len(view)

    def stopping(client: StoreClient, *arguments: Any) -> Iterator[Buffer]:  # noqa: ANN401
        for part in get(client, *arguments):
            upload.stop()
            yield part

    monkeypatch.setattr(StoreClient, "get", stopping)
    upload = Upload(
        parse_address("s3://golden/stopped.qed"),
        Content(),
        20 * MIB,
        ClientOptions(),
        overwrite=False,
        progress=None,
    )
    with pytest.raises(StoppedError):
        upload.run()
    assert read_parts == [(60, MIB)]
    assert "stopped.qed" not in store.keys("golden")


def test_part_lengths() -> None:
    """Parts are as few as stores allow, and no larger than memory allows."""
    assert part_bytes(0) == part_bytes(8000 * MIB) == 8 * MIB
    assert part_bytes(8001 * MIB) == 16 * MIB
    assert part_bytes(100 << 30) == part_bytes(600 << 30) == 64 * MIB
    assert part_bytes(5 << 40) == 528 * MIB
