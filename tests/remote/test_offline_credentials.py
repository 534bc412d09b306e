"""Objects that the cache has are read with any credentials, also with invalid ones."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.errors import RemoteError
from qedfuse.remote.address import parse_address
from qedfuse.remote.client import ClientOptions, UnusableError
from qedfuse.remote.unconfigured import UnconfiguredClient
from qedfuse.remote.unitfile import UNIT_BYTES
from tests.support.disks import build_image
from tests.support.remotes import DEADLINES, opened, read, some_bytes
from tests.support.webserver import serving

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = some_bytes(2.5)
CONFIGURATIONS = {
    "half a key": ("s3", {"AWS_ACCESS_KEY_ID": "key"}),
    "no profile": ("s3", {"AWS_PROFILE": "none"}),
    "a key with the end of a line": ("s3", {"AWS_ACCESS_KEY_ID": "a\nb"}),
    "a missing file": ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "/nonexistent/key.json"}),
    "a key that is not base64": ("az", {"AZURE_STORAGE_ACCOUNT_KEY": "%"}),
}
"""Schemes, and variables that configure no usable store."""

FAILURE = RemoteError("s3://images/disk.qed: found no key")

pytestmark = pytest.mark.usefixtures("bare_environment")
from_cache = pytest.mark.expect_log("reading it from the cache")


def set_endpoints(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Name a server as the store of each scheme."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{port}/account")


@from_cache
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_complete_entry_with_invalid_credentials(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete entry is read with invalid credentials, without any request."""
    scheme, variables = CONFIGURATIONS[name]
    url = f"{scheme}://images/disk.qed"
    with serving(CONTENT) as server:
        set_endpoints(monkeypatch, server.port)
        with opened(url, tmp_path, deadlines=DEADLINES) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        asked = len(server.headers)
        with opened(url, tmp_path, deadlines=DEADLINES) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
        assert len(server.headers) == asked


@from_cache
def test_complete_entry_with_wrong_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete entry is read when the store refuses the credentials."""
    with serving(CONTENT) as server:
        set_endpoints(monkeypatch, server.port)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        with opened("s3://images/disk.qed", tmp_path, deadlines=DEADLINES) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
        server.always = "status 403"
        with opened("s3://images/disk.qed", tmp_path, deadlines=DEADLINES) as file:
            assert read(file, 0, len(CONTENT)) == CONTENT
        assert server.struck["status 403"] >= 1


@pytest.mark.parametrize("name", ["missing", "a directory", "open to others", "another form"])
def test_a_credentials_file_that_cannot_be_used(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that the user names must be readable, also if the cache has the whole object.

    The file may name the endpoint of the store, so without the file it is unknown which object of
    the cache is meant.  With a readable file that has no valid credentials, the cache is used.
    """
    cache, secrets = tmp_path / "cache", tmp_path / "secrets"
    url = "s3://images/disk.qed"
    words = ("map", f"--cache-dir={cache}", f"--credentials={secrets}", "--remote-timeout=1", url)
    with serving(bytes(build_image(1 << 20))) as server:
        set_endpoints(monkeypatch, server.port)
        with opened(url, cache) as file:
            read(file, 0, len(server.content))
        server.always, server.heads_fail = "status 403", True
        asked = len(server.headers)
        if name == "a directory":
            secrets.mkdir()
        elif name != "missing":
            secrets.write_text("half a li" if name == "another form" else "A=b\n")
            secrets.chmod(0o640 if name == "open to others" else 0o600)
        assert main(list(words)) == {"a directory": 12}.get(name, 1)
        error = capsys.readouterr().err
        assert error.startswith(f"qedimg: {secrets}: ")
        assert error.count("\n") == 1
        assert len(server.headers) == asked


@from_cache
def test_a_credentials_file_without_valid_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a readable file that has half a key, a complete entry of the cache is read."""
    cache, secrets = tmp_path / "cache", tmp_path / "secrets"
    secrets.write_text("AWS_ACCESS_KEY_ID=key\n")
    secrets.chmod(0o600)
    url = "s3://images/disk.qed"
    with serving(bytes(build_image(1 << 20))) as server:
        set_endpoints(monkeypatch, server.port)
        with opened(url, cache) as file:
            read(file, 0, len(server.content))
        asked = len(server.headers)
        assert main(["map", f"--cache-dir={cache}", f"--credentials={secrets}", url]) == 0
        assert len(server.headers) == asked


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_incomplete_entry_with_invalid_credentials(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a complete entry, the message says what is wrong with the credentials."""
    scheme, variables = CONFIGURATIONS[name]
    url = f"{scheme}://images/disk.qed"
    with serving(CONTENT) as server:
        set_endpoints(monkeypatch, server.port)
        with opened(url, tmp_path, deadlines=DEADLINES) as file:
            assert read(file, 0, 10) == CONTENT[:10]
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        with pytest.raises(RemoteError) as caught, opened(url, tmp_path):
            pass
        assert caught.value.errno == errno.EINVAL
        assert "refused" not in str(caught.value)


@from_cache
@pytest.mark.expect_log("what is not in the cache cannot be read")
@pytest.mark.expect_log("answers again")
def test_credentials_that_become_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cache lacks is an error of one range, until the credentials are valid."""
    with serving(CONTENT) as server:
        set_endpoints(monkeypatch, server.port)
        with opened("s3://images/disk.qed", tmp_path, deadlines=DEADLINES) as file:
            assert read(file, 0, UNIT_BYTES) == CONTENT[:UNIT_BYTES]
            assert file.fetcher.mark_usable_offline(b"\1\0\0")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        with opened("s3://images/disk.qed", tmp_path, deadlines=DEADLINES) as file:
            assert read(file, 0, UNIT_BYTES) == CONTENT[:UNIT_BYTES]
            with pytest.raises(RemoteError, match="refused: credentials: found AWS_ACCESS_KEY_ID"):
                read(file, 2 * UNIT_BYTES, 10)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            assert read(file, 0, len(CONTENT)) == CONTENT
        assert "AWS4-HMAC-SHA256" in server.authorizations[-1]


@pytest.mark.parametrize("endpoint", ["http://store.example", "store.example"])
def test_endpoint_that_is_not_allowed(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint that is not allowed identifies no store, so no entry is used for it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UnusableError, match="endpoint"):
        UnconfiguredClient(parse_address("s3://images/disk.qed"), ClientOptions(), FAILURE)
