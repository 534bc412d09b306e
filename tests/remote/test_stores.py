"""Reading from real servers: an object store (OpenStack Swift), and nginx with TLS."""

from __future__ import annotations

import errno
import os
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import obstore
import pytest

from qedfuse.errors import ObjectChangedError, QedError, RemoteError
from qedfuse.remote.address import parse_address
from qedfuse.remote.client import ClientOptions
from qedfuse.remote.opening import open_remote
from qedfuse.remote.options import Deadlines, RemoteOptions
from qedfuse.remote.storesettings import make_store

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.nginx import Nginx
    from tests.support.swift import Swift

CONTENT = os.urandom(700_001)
"""Two units and a part of one."""
SHORT = Deadlines(connect_seconds=1, attempt_seconds=1, total_seconds=1)


pytestmark = pytest.mark.usefixtures("bare_environment")


@pytest.fixture
def options(tmp_path: Path) -> RemoteOptions:
    """Return options with an empty cache."""
    return RemoteOptions(cache_directory=str(tmp_path / "cache"))


def read(url: str, options: RemoteOptions) -> bytes:
    """Return the content of an object."""
    file = open_remote(parse_address(url), options)
    try:
        buffer = bytearray(file.size())
        assert file.read_blocking(0, memoryview(buffer)) == len(buffer)
        return bytes(buffer)
    finally:
        file.close()


def failure(url: str, options: RemoteOptions, kind: type[QedError] = RemoteError) -> str:
    """Return the message with which opening fails: one line, which has no secret."""
    with pytest.raises(kind) as caught:
        open_remote(parse_address(url), options).close()
    text = str(caught.value)
    assert text.startswith(url)
    assert "\n" not in text
    assert "Signature" not in text.replace("SignatureDoesNotMatch", "")
    return text


@pytest.mark.parametrize("key", ["disk.qed", "a b/ü%2520 [1].qed", "it's~(x)!$&+,;=:@"])
def test_object_is_read(store: Swift, options: RemoteOptions, key: str) -> None:
    """An object is read as it was stored, whatever characters its key has."""
    url = f"s3://golden/{key}".replace("%", "%25").replace(" ", "%20").replace("ü", "%C3%BC")
    obstore.put(make_store(parse_address(url), ClientOptions()).handle, key, CONTENT)
    assert key in store.keys("golden")
    assert read(url.replace("[", "%5B").replace("]", "%5D"), options) == CONTENT


def test_multipart_object_is_read(store: Swift, options: RemoteOptions) -> None:
    """An object that was uploaded in parts has an ETag that no MD5 is, and is read like others."""
    content = CONTENT * 16
    handle = make_store(parse_address("s3://golden/parts"), ClientOptions()).handle
    result = obstore.put(handle, "parts", content, chunk_size=5 << 20, use_multipart=True)
    assert str(result["e_tag"]).endswith('-3"')
    assert read("s3://golden/parts", options) == content
    assert store.keys("golden+segments")


def test_credentials_file_replaces_environment(
    store: Swift, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables of a credentials file hide those of the environment, also the session token."""
    store.put("golden", "disk", CONTENT)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another key")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    given = replace(options, credentials=tuple(store.variables.items()))
    assert read("s3://golden/disk", given) == CONTENT


def test_profile_of_amazons_tools(
    store: Swift, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a key in the environment, the profile in ~/.aws/credentials is used."""
    store.put("golden", "disk", CONTENT)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        "[lab]\naws_access_key_id = test:tester\naws_secret_access_key=testing\n"
    )
    assert read("s3://golden/disk", options) == CONTENT
    monkeypatch.setenv("AWS_PROFILE", "other")
    empty = replace(options, cache_directory=str(tmp_path / "empty"))
    assert "found no profile other, expected it" in failure("s3://golden/disk", empty)
    for lines, found in (
        ("aws_access_key_id = test:tester", "aws_access_key_id alone"),
        ("aws_secret_access_key = testing", "aws_secret_access_key alone"),
    ):
        for profile in ("lab", "default"):
            monkeypatch.setenv("AWS_PROFILE", profile)
            (tmp_path / ".aws/credentials").write_text(f"[{profile}]\n{lines}\n")
            text = failure("s3://golden/disk", empty)
            assert f"profile {profile}: found {found}, expected aws_access_key_id and " in text
    monkeypatch.delenv("AWS_PROFILE")
    (tmp_path / ".aws/credentials").write_text("[default]\naws_access_key_id = test:tester\n")
    text = failure("s3://golden/disk", empty)
    assert "profile default: found aws_access_key_id alone" in text


def test_wrong_secret_is_refused(
    store: Swift, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong secret gives EACCES, and the message has the server's reason but no signature."""
    store.put("golden", "disk", CONTENT)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    text = failure("s3://golden/disk", options)
    assert "refused: found HTTP status 403 (SignatureDoesNotMatch: The request" in text
    assert "wrong-secret" not in text
    assert "test:tester" not in text


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("url", "missing"), [("s3://golden/none", "object"), ("s3://no-bucket/none", "bucket")]
)
def test_missing_object_and_bucket(options: RemoteOptions, url: str, missing: str) -> None:
    """A missing object and a missing bucket give different messages."""
    assert failure(url, options) == f"{url}: found no such {missing}"


@pytest.mark.expect_log("s3://golden/changes: found another version of the object")
def test_overwritten_object(store: Swift, options: RemoteOptions) -> None:
    """What an overwritten object has now is never mixed with what was read of it before."""
    store.put("golden", "changes", CONTENT)
    file = open_remote(parse_address("s3://golden/changes"), options)
    try:
        first = memoryview(bytearray(512))
        assert file.read_blocking(0, first) == 512
        store.put("golden", "changes", CONTENT[::-1])
        with pytest.raises(ObjectChangedError, match="another version"):
            file.read_blocking(600_000, memoryview(bytearray(512)))
        assert file.read_blocking(512, first) == 512
        assert first == CONTENT[512:1024]
    finally:
        file.close()


def test_version_in_the_url(store: Swift, options: RemoteOptions) -> None:
    """A URL with a version reads that version, whatever the object has now."""
    old = store.put("versions", "disk", CONTENT)
    store.put("versions", "disk", CONTENT[::-1])
    assert read("s3://versions/disk", options) == CONTENT[::-1]
    assert read(f"s3://versions/disk?versionId={old}", options) == CONTENT
    url = "s3://versions/disk?versionId=1234567890.12345"
    assert failure(url, options) == f"{url}: found no such object"


@pytest.mark.expect_log("s3://golden/disk: found no answer in time (attempts: 1)")
@pytest.mark.expect_log("s3://golden/disk: answers again")
def test_stopped_server(store: Swift, options: RemoteOptions) -> None:
    """A server that stops gives an error within the deadlines, and is read again afterwards."""
    store.put("golden", "disk", CONTENT)
    file = open_remote(parse_address("s3://golden/disk"), replace(options, deadlines=SHORT))
    try:
        content = bytearray(len(CONTENT))
        with store.stopped():
            begin = time.monotonic()
            with pytest.raises(RemoteError, match="found no answer in time"):
                file.read_blocking(0, memoryview(content))
            assert time.monotonic() - begin < 15
        assert file.read_blocking(0, memoryview(content)) == len(content)
        assert content == CONTENT
    finally:
        file.close()


@pytest.mark.usefixtures("store")
def test_refused_connection(options: RemoteOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for a failed connection is in the message."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    short = replace(options, deadlines=SHORT)
    assert "Connection refused (attempts:" in failure("s3://golden/disk", short)


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("http://store.example", "found http://store.example/ without TLS on another machine"),
        ("HTTP://STORE.example", "found http://store.example/ without TLS on another machine"),
        ("http://127.0.0.1@store.example", "URL user: found one"),
        ("store.example:80", "URL scheme: found no scheme"),
        ("s3://store.example", "found s3://store.example/, expected https://HOST"),
    ],
)
def test_endpoint_without_tls(
    options: RemoteOptions, monkeypatch: pytest.MonkeyPatch, endpoint: str, expected: str
) -> None:
    """An endpoint on another machine must have TLS."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert expected in failure("s3://golden/disk", options)


@pytest.mark.usefixtures("store")
def test_empty_variables(options: RemoteOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable counts as not set; obstore would panic at an empty endpoint."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "")
    monkeypatch.setenv("AWS_ENDPOINT", "")
    assert "found no such object" in failure("s3://golden/none", options)
    assert "AWS_ENDPOINT" not in os.environ
    # Amazon's own endpoint, which has no address or no such bucket here.
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_ENDPOINT", "")
    handle = make_store(parse_address("s3://golden/none"), ClientOptions()).handle
    assert "endpoint" not in str(handle)


def test_panic_of_obstore(options: RemoteOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic inside obstore is an error of the file, with one line."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setattr("qedfuse.remote.storeidentity.check_value", lambda *_: None)
    monkeypatch.setattr("qedfuse.remote.storevariables.check_value", lambda *_: None)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a\nb")
    assert "found an error inside obstore" in failure("s3://golden/disk", options)


@pytest.mark.parametrize(("host", "is_allowed"), [("127.0.0.1:9", True), ("10.0.0.1", False)])
def test_endpoint_of_azure_without_tls(
    options: RemoteOptions, monkeypatch: pytest.MonkeyPatch, host: str, *, is_allowed: bool
) -> None:
    """The rule for an endpoint without TLS is the same for all stores."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://{host}/account")
    text = failure("az://golden/disk", replace(options, deadlines=SHORT))
    assert ("Connection refused" if is_allowed else "without TLS on another machine") in text


def test_half_a_key(options: RemoteOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key without its secret is an error, and no reason to go on without credentials."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    assert "found AWS_ACCESS_KEY_ID alone" in failure("s3://golden/disk", options)


@pytest.mark.parametrize(
    ("url", "in_file", "outside"),
    [
        ("az://c/k", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"),
        ("gs://b/k", "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
def test_two_identities(
    options: RemoteOptions, monkeypatch: pytest.MonkeyPatch, url: str, in_file: str, outside: str
) -> None:
    """An identity in a credentials file is never mixed with another one of the environment."""
    monkeypatch.setenv(outside, "hush")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    text = failure(url, replace(options, credentials=((in_file, "hush"),)))
    expected = f"credentials: found {outside} in the environment beside others in the file"
    assert expected in text
    assert "hush" not in text


def test_public_bucket_without_credentials(
    nginx: Nginx, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without credentials a public bucket is read immediately, also if a metadata service hangs."""
    (nginx.directory / "public").mkdir(exist_ok=True)
    (nginx.directory / "public/disk").write_bytes(CONTENT)
    monkeypatch.setenv("AWS_ENDPOINT_URL", nginx.https)
    monkeypatch.setenv("SSL_CERT_FILE", str(nginx.certificate))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{port}")
        assert read("s3://public/disk", options) == CONTENT
        silent.settimeout(0)
        with pytest.raises(BlockingIOError):
            silent.accept()


@pytest.mark.usefixtures("store")
def test_private_bucket_without_credentials(
    options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message about a private bucket says that no credentials were found, and what to set."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    text = failure("s3://golden/disk", options)
    assert "(found no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)" in text


def test_certificate_that_is_not_trusted(
    nginx: Nginx, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that is not trusted is named as the reason, by both clients."""
    (nginx.directory / "disk").write_bytes(CONTENT)
    text = failure(f"{nginx.https}/disk", replace(options, deadlines=SHORT))
    assert "TLS: certificate: found self-signed certificate, expected one that is trusted" in text
    monkeypatch.setenv("AWS_ENDPOINT_URL", nginx.https)
    text = failure("s3://golden/disk", options)
    assert "TLS: certificate: found UnknownIssuer, expected one that is trusted" in text


def test_https_with_own_certificate(
    nginx: Nginx, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SSL_CERT_FILE names the certificates that are trusted."""
    (nginx.directory / "disk").write_bytes(CONTENT)
    monkeypatch.setenv("SSL_CERT_FILE", str(nginx.certificate))
    assert read(f"{nginx.https}/disk", options) == CONTENT


def test_secret_in_a_url_of_azure(options: RemoteOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signature that Azure puts into URLs is in no message."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2020&sig=topsecret")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "https://127.0.0.1:9")
    text = failure("az://golden/disk", replace(options, deadlines=SHORT))
    assert "topsecret" not in text
    assert "Connection refused" in text


@pytest.mark.usefixtures("store")
def test_missing_object_is_enoent(options: RemoteOptions) -> None:
    """A missing object has the error number of a missing file."""
    with pytest.raises(RemoteError) as caught:
        open_remote(parse_address("s3://golden/none"), options)
    assert caught.value.errno == errno.ENOENT
