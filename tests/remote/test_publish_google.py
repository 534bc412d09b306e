"""``qedimg publish`` to Google's store: which requests it makes, and what is left in the store.

The emulators do not know the requests that obstore makes for uploads: fake-gcs-server takes none of
them, and gcp-storage-emulator none for parts.  So the store is a server of the tests that follows
Google's description of the interface.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.cli.qedimg.main import main
from qedfuse.remote.address import parse_address
from qedfuse.remote.client import ClientOptions
from qedfuse.remote.upload import Upload
from qedfuse.remote.uploadcheck import StoppedError
from qedfuse.remote.uploadcontent import ContentParts
from qedfuse.tools.copying import publish as module
from qedfuse.tools.copying.publish import publish
from tests.support.googlestore import GoogleStore, serving_google
from tests.support.nginx import make_certificate
from tests.support.servers import missing_programs
from tests.support.webserver import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
URL = "gs://golden/dir/golden%20image.qed"
KEY = "dir/golden image.qed"
LONG = os.urandom(20 * MIB + 7)
"""Content that is stored in three parts."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate for the store."""
    if missing := missing_programs("openssl"):
        pytest.skip(f"not installed: {', '.join(missing)}")
    return make_certificate(tmp_path_factory.mktemp("google"))


@pytest.fixture
def google(
    certificate: Path,
    bare_environment: None,  # noqa: ARG001  its effect counts
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[GoogleStore]:
    """Run an empty store, which the environment names."""
    monkeypatch.setattr(ContentParts, "_drain", lambda _: None)
    with serving_google(certificate) as store:
        for name, value in store.variables(certificate).items():
            monkeypatch.setenv(name, value)
        yield store


@pytest.fixture(params=[0, 5, len(LONG)])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Make a raw file that is empty, is sent with one request, or is sent in parts."""
    path = tmp_path / "disk.raw"
    path.write_bytes(LONG[: request.param])
    return path


in_parts = pytest.mark.parametrize("source", [len(LONG)], indirect=True)


def test_the_requests(google: GoogleStore, source: Path) -> None:
    """A short file is one request with a condition; a long one is sent in parts, and read again.

    The store is asked for an object before the last request makes one.
    """
    assert main(["publish", "-q", str(source), URL]) == 0
    assert google.objects[KEY].content == source.read_bytes()
    assert not google.uploads
    sent = [name for name in google.log if not name.startswith(("get", "head"))]
    if source.stat().st_size <= 8 * MIB:
        assert sent == ["put"]
        return
    assert sent[0] == "start"
    assert sorted(sent[1:-1]) == ["part 1", "part 2", "part 3"]
    assert sent[-1] == "complete"
    asked = [number for number, name in enumerate(google.log) if name == "head 404"]
    assert asked[0] < google.log.index("start") < asked[1] < google.log.index("complete")
    # The entity tag is no checksum, so each part is read.
    assert google.log[google.log.index("complete") :].count("get") >= 3


def test_an_object_is_kept(
    google: GoogleStore, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An object is replaced with --force only."""
    google.save(KEY, b"old")
    assert main(["publish", str(source), URL]) == 1
    assert capsys.readouterr().err == (
        f"qedimg: {URL}: found an object, expected none (--force replaces it)\n"
    )
    assert google.objects[KEY].content == b"old"
    assert main(["publish", "-q", "--force", str(source), URL]) == 0
    assert google.objects[KEY].content == source.read_bytes()


@pytest.mark.parametrize("source", [5, len(LONG)], indirect=True)
def test_an_object_that_appears_meanwhile(
    google: GoogleStore, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An object that another program stores after the first look is kept, and no part is left."""
    moment = "get" if source.stat().st_size <= 8 * MIB else "part 1"

    def store_another(name: str) -> None:
        if name == moment and KEY not in google.objects:
            google.save(KEY, b"first")

    google.on_request = store_another
    assert main(["publish", str(source), URL]) == 1
    assert "found an object, expected none" in capsys.readouterr().err
    assert google.objects[KEY].content == b"first"
    assert not google.uploads
    assert ("abort" if moment == "part 1" else "put 412") in google.log


@pytest.mark.parametrize("source", [5, len(LONG)], indirect=True)
def test_other_bytes_are_noticed(
    google: GoogleStore, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An object that differs from the file is deleted."""
    google.damages = True
    assert main(["publish", str(source), URL]) == 22
    assert "found other bytes stored at 0, expected the content" in capsys.readouterr().err
    assert google.log[-1] == "delete"
    assert not google.objects


@in_parts
async def test_a_file_that_changes(google: GoogleStore, source: Path) -> None:
    """After a failure in the middle, the parts are removed."""
    with pytest.raises(Exception, match="found the file changed during the upload"):
        await publish(str(source), URL, progress=lambda _done, _total: os.utime(source))
    assert "start" in google.log
    assert "abort" in google.log
    assert not google.uploads
    assert not google.objects


@in_parts
@pytest.mark.expect_log("stopping the upload")
@pytest.mark.expect_log("the store may still have the object or parts")
async def test_a_removal_that_takes_too_long(
    google: GoogleStore,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A cancelled call waits for a limited time, and a line says what may be left."""
    released = threading.Event()
    monkeypatch.setattr(module, "_STOP_SECONDS", 0.1)
    monkeypatch.setattr(ContentParts, "_drain", lambda _: released.wait(30))
    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:
        await publish(
            str(source), URL, progress=lambda _done, _total: token.run_sync_soon(scope.cancel)
        )
    assert scope.cancelled_caught
    assert google.uploads
    _, line = caplog.messages
    assert line == (
        f"{URL}: the upload has not ended; the store may still have the object or parts of it"
    )
    released.set()
    await trio.to_thread.run_sync(wait_until, lambda: not google.uploads)


@in_parts
def test_a_lost_answer(google: GoogleStore, source: Path) -> None:
    """If the answer to the last request is lost, the object is compared with the file."""
    google.lost.append("complete")
    assert main(["publish", "-q", str(source), URL]) == 0
    assert not google.lost
    assert "complete 404" in google.log, "obstore has repeated the request"
    assert google.objects[KEY].content == LONG


@in_parts
def test_a_part_is_sent_until_it_is_answered(
    google: GoogleStore, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that breaks several times in a row does not end an upload."""
    monkeypatch.setattr("qedfuse.remote.storesettings._MAX_PAUSE_SECONDS", 0.1)
    google.lost += ["part 2"] * 8
    assert main(["publish", "-q", str(source), URL]) == 0
    assert not google.lost
    assert google.objects[KEY].content == LONG


@in_parts
def test_parts_that_cannot_be_removed(
    google: GoogleStore, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the store answers neither to a part nor to the removal, the message says what is left."""
    google.lost += ["part 2", "abort"] * 1000
    assert main(["publish", "-q", "--remote-timeout", "0.5", str(source), URL]) == 22
    assert capsys.readouterr().err.endswith(
        "; the store may still have the object or parts of it\n"
    )
    assert "start" in google.log


@in_parts
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("moment", ["complete", "get"])
@pytest.mark.parametrize("is_other", [False, True])
def test_stopped_after_a_lost_answer(
    google: GoogleStore, source: Path, moment: str, *, overwrite: bool, is_other: bool
) -> None:
    """If the upload is stopped when the answer was lost, its object is deleted.

    The object is kept if it may have replaced another one, or if it has other content.
    """
    content = source.read_bytes()

    class Content:
        def read_blocking(self, offset: int, view: memoryview) -> int:
            view[:] = content[offset : offset + len(view)]
            return len(view)

    def stop(name: str) -> None:
        if "complete" in google.log and name == moment:
            upload.stop()
            if is_other:
                google.save(KEY, content[:-1] + b"x")

    google.on_request = stop
    google.lost.append("complete")
    upload = Upload(
        *(parse_address(URL), Content(), len(content), ClientOptions()),
        overwrite=overwrite,
        progress=None,
    )
    with pytest.raises(StoppedError):
        upload.run()
    assert not google.lost
    assert (KEY in google.objects) is (overwrite or is_other)
    assert not google.uploads


class Keys:
    """A file of credentials, and what happens to its keys during an upload to an S3 store."""

    def __init__(self, store: GoogleStore, path: Path) -> None:
        self.store = store
        self.path = path
        self.use("first")

    def use(self, key: str) -> None:
        """Replace the file by one with another key."""
        new = self.path.with_name("new")
        new.touch(mode=0o600)
        new.write_text(
            f"AWS_ACCESS_KEY_ID={key}\nAWS_SECRET_ACCESS_KEY=secret\nGOOGLE_BEARER_TOKEN={key}\n"
        )
        new.rename(self.path)

    def expire(self, name: str) -> None:
        """Let the first key expire when the store has all parts of the first upload."""
        sent = {number for parts in self.store.uploads.values() for number in parts}
        if name.startswith("part ") and sent == {1, 2, 3}:
            self.store.expired.add("first")


@pytest.fixture
def keys(
    google: GoogleStore, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Keys:
    """Let the environment name the store, also as one of S3, and make a file of credentials."""
    monkeypatch.delenv("GOOGLE_SERVICE_ACCOUNT_KEY")
    monkeypatch.setenv("GOOGLE_BASE_URL", f"https://localhost:{google.port}")
    for name, value in google.s3_variables(certificate).items():
        monkeypatch.setenv(name, value)
    return Keys(google, tmp_path / "credentials")


def publish_with(keys: Keys, source: Path, *words: str, scheme: str = "s3") -> int:
    """Run a publish to the store with the file of credentials; return the exit code."""
    url = URL.replace("gs:", f"{scheme}:")
    return main(["publish", "-q", *words, "--credentials", str(keys.path), str(source), url])


@in_parts
def test_a_key_that_is_replaced_in_time(google: GoogleStore, source: Path, keys: Keys) -> None:
    """If the file has a new key before the old one expires, the upload goes on with the new one."""

    def on_request(name: str) -> None:
        if name == "part 1":
            keys.use("second")
        keys.expire(name)

    google.on_request = on_request
    assert publish_with(keys, source) == 0
    assert google.expired == {"first"}
    assert (google.signed[0], google.signed[-1]) == ("first", "second")
    assert (google.log.count("start"), google.log.count("complete")) == (1, 1)
    assert "abort" not in google.log
    assert google.objects[KEY].content == LONG


@in_parts
@pytest.mark.expect_log("the store refused the credentials during the upload, which begins again")
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_key_that_is_replaced_too_late(
    google: GoogleStore, source: Path, keys: Keys, scheme: str
) -> None:
    """If the file has a new key only after a refusal, the upload begins again."""

    def on_request(name: str) -> None:
        keys.expire(name)
        if name == "refused":
            keys.use("second")

    google.on_request = on_request
    assert publish_with(keys, source, "--force", scheme=scheme) == 0
    assert (google.signed[0], google.signed[-1]) == ("first", "second")
    assert google.log.count("start") == 2
    assert "refused 400" in google.log
    assert google.objects[KEY].content == LONG


@in_parts
@pytest.mark.expect_log("the store refused the credentials during the upload, which begins again")
def test_a_key_that_is_not_replaced(
    google: GoogleStore, source: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the key expires, and there is no other, the file is not sent a second time."""
    google.on_request = keys.expire
    assert publish_with(keys, source, "--force") == 27
    assert "refused: found HTTP status 400 (ExpiredToken" in capsys.readouterr().err
    assert google.log.count("start") == 1
    assert not google.objects


@in_parts
def test_a_key_that_has_expired_before(
    google: GoogleStore, source: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the first request is refused, nothing was sent, and the message is the only line."""
    google.expired.add("first")
    assert publish_with(keys, source, "--force") == 27
    assert capsys.readouterr().err.count("\n") == 1
    assert set(google.log) == {"refused 400"}
