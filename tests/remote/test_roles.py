"""Credentials from the role of a machine or container, which a service of the cloud gives."""

from __future__ import annotations

import errno
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.errors import RemoteError
from qedfuse.remote.keyservices import _firmware_text
from tests.support.keyservice import ROLE, SESSION, KeyService, giving_keys
from tests.support.proxies import proxying
from tests.support.remotes import DEADLINES, MAX_SECONDS, opened, read, some_bytes
from tests.support.webserver import WebServer, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENT: Final = some_bytes(2.5)
AMAZON: Final = "s3.us-east-1.amazonaws.com"
AMAZON_VPC: Final = "bucket.vpce-1.s3.eu-central-1.vpce.amazonaws.com"
AZURE: Final = "account.blob.core.windows.net"
ECS: Final = "169.254.170.2"
KINDS: Final = (
    *("container", "ECS", "web identity", "EC2", "EC2 in a VPC", "Google", "Azure"),
    "Azure App Service",
)
WITH_PROXY: Final = ("ECS", "EC2", "EC2 in a VPC", "Azure App Service")
"""Kinds of roles whose service or store has a fixed address, for which a proxy stands in."""

pytestmark = pytest.mark.usefixtures("bare_environment")


@dataclass
class Role:
    """A machine or container with a role, and a store.

    Attributes:
        url: An object of the store.
        service: The service that gives the keys of the role.
        store: The store.
    """

    url: str
    service: KeyService
    store: WebServer

    def signers(self) -> list[str]:
        """Return the name of the key with which each request was signed."""
        if self.url.startswith("s3:"):
            return [
                text.partition("Credential=")[2].split("/")[0] for text in self.store.authorizations
            ]
        return [text.removeprefix("Bearer bearer-") for text in self.store.authorizations]

    def signer(self, number: int) -> str:
        """Return the name of a key by its number."""
        return f"KEY{number}" if self.url.startswith("s3:") else str(number)

    def session_tokens(self) -> set[str]:
        """Return the session tokens in the requests."""
        name = "x-amz-security-token"
        return {
            value
            for headers in self.store.headers
            for key, value in headers.items()
            if key.lower() == name
        }


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Return the name of a kind of role."""
    return str(request.param)


@pytest.fixture
def role(
    kind: str, tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Role]:
    """Run a service for keys and a store, which the environment names."""
    token = tmp_path / "token"
    token.write_text("of-the-container")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with _services(kind, certificate) as (service, store):
        variables = _variables(kind, service, store, token)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        scheme = {"Google": "gs", "Azure": "az", "Azure App Service": "az"}.get(kind, "s3")
        role = Role(f"{scheme}://images/disk.qed", service, store)
        hosts = {f"{host}:443": store.port for host in (AMAZON, AMAZON_VPC, AZURE)}
        with proxying({**hosts, ECS: service.port}) as proxy:
            if kind in WITH_PROXY:
                monkeypatch.setenv("ALL_PROXY", proxy.url)
                monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            yield role


@contextmanager
def _services(kind: str, certificate: Path) -> Iterator[tuple[KeyService, WebServer]]:
    """Run a service for keys and a store, each with TLS where obstore demands it."""
    with (
        giving_keys(certificate if kind == "web identity" else None) as service,
        serving(CONTENT, certificate if kind in WITH_PROXY[1:] else None) as store,
    ):
        yield service, store


def _variables(kind: str, service: KeyService, store: WebServer, token: Path) -> dict[str, str]:
    """Return the variables that configure a role."""
    endpoint = f"{store.scheme}://127.0.0.1:{store.port}"
    return {
        "container": {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{service.url}/container/key",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(token),
        },
        "ECS": {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/container/key?id=1",
        },
        "web identity": {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
            "AWS_ROLE_ARN": "arn:aws:iam::1:role/reader",
            "AWS_ENDPOINT_URL_STS": service.url,
        },
        "EC2": {"AWS_METADATA_ENDPOINT": service.url},
        "EC2 in a VPC": {
            "AWS_METADATA_ENDPOINT": service.url,
            "AWS_ENDPOINT_URL": f"https://{AMAZON_VPC}",
        },
        "Google": {
            "GOOGLE_BASE_URL": endpoint,
            "GCE_METADATA_HOST": service.url.removeprefix("http://"),
            "GCE_METADATA_IP": service.url.removeprefix("http://"),
        },
        "Azure": {
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_STORAGE_ENDPOINT": f"{endpoint}/account",
            "AZURE_IDENTITY_ENDPOINT": f"{service.url}/msi",
            "IDENTITY_HEADER": "of-the-machine",
        },
        "Azure App Service": {
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "IDENTITY_ENDPOINT": f"{service.url}/msi",
            "IDENTITY_HEADER": "of-the-machine",
        },
    }[kind]


def test_requests_are_signed_with_the_key_of_the_role(
    role: Role, kind: str, tmp_path: Path
) -> None:
    """Every request is signed with the key of the role, which is fetched once while it is valid."""
    role.store.others["/account/images/disk.qed"] = CONTENT
    with opened(role.url, tmp_path / "cache") as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
    assert len(role.signers()) >= 2
    assert set(role.signers()) == {role.signer(1)}
    assert role.service.keys == 1
    if role.url.startswith("s3:"):
        assert role.session_tokens() == {"token-1"}
        assert len(role.store.headers) == len(role.signers())
    method, path, _ = role.service.requests[-1]
    if kind == "container":
        assert (method, path) == ("GET", "/container/key")
        assert role.service.header("authorization") == ["of-the-container"]
    elif kind == "ECS":
        assert (method, path) == ("GET", "/container/key?id=1")
    elif kind == "web identity":
        assert method == "POST"
        assert "WebIdentityToken=of-the-container" in path
        assert "RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Freader" in path
    elif kind.startswith("EC2"):
        assert [asked[:2] for asked in role.service.requests] == [
            ("PUT", "/latest/api/token"),
            ("GET", "/latest/meta-data/iam/security-credentials/"),
            ("GET", f"/latest/meta-data/iam/security-credentials/{ROLE}"),
        ]
        assert role.service.header("x-aws-ec2-metadata-token") == ["", SESSION, SESSION]
    elif kind == "Google":
        assert role.service.header("metadata-flavor") == ["Google"]
    else:
        assert role.service.header("x-identity-header") == ["of-the-machine"]


def test_an_expired_key_is_replaced(role: Role, tmp_path: Path) -> None:
    """After a key has expired, a request is signed with a new one; the reader notices nothing."""
    role.service.lifetime_seconds = -5
    with opened(role.url, tmp_path / "cache") as file:
        assert read(file, 0, 100) == CONTENT[:100]
        role.service.lifetime_seconds = 3600
        assert read(file, 0, len(CONTENT)) == CONTENT
    assert role.signers()[0] == role.signer(1)
    assert role.signers()[-1] != role.signer(1)
    assert role.service.keys >= 2


def test_a_refused_key_is_fetched_again(role: Role, tmp_path: Path) -> None:
    """A key that the store refuses before it expires is fetched again, once."""
    with opened(role.url, tmp_path / "cache") as file:
        role.store.required = "KEY2" if role.url.startswith("s3:") else "bearer-2"
        assert read(file, 0, len(CONTENT)) == CONTENT
    assert role.signers()[-1] == role.signer(2)
    assert role.service.keys == 2


@pytest.mark.parametrize("status", [400, 403, 404])
def test_a_service_that_refuses(
    role: Role, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine without a role gets one line that names the service, and no unsigned request."""
    role.service.status = status
    expected = f"{role.url}: refused: service for credentials: found HTTP status {status}"
    with pytest.raises(RemoteError) as caught, opened(role.url, None, deadlines=DEADLINES):
        pass
    assert str(caught.value) == expected
    assert caught.value.errno == errno.EACCES
    assert main(["info", f"--cache-dir={tmp_path}", role.url]) == 27
    assert capsys.readouterr().err == f"qedimg: {expected}\n"
    assert role.store.headers == []


def test_a_service_that_does_not_answer(role: Role) -> None:
    """A service that does not answer is an error within the deadlines, which names the service."""
    role.service.is_silent = True
    begin = time.monotonic()
    with pytest.raises(RemoteError) as caught, opened(role.url, None, deadlines=DEADLINES):
        pass
    assert time.monotonic() - begin < MAX_SECONDS
    assert caught.value.errno == errno.EIO
    message = str(caught.value)
    assert message.startswith(f"{role.url}: service for credentials: found no answer in time")
    assert role.store.headers == []


def test_a_service_that_gives_no_key(role: Role) -> None:
    """An answer without a key is an error that names the service, and no request is unsigned."""
    role.service.garbage = b"garbage"
    with pytest.raises(RemoteError) as caught, opened(role.url, None, deadlines=DEADLINES):
        pass
    assert str(caught.value).startswith(f"{role.url}: service for credentials: ")
    assert role.store.headers == []


@pytest.mark.expect_log("reading it from the cache")
@pytest.mark.parametrize("failure", ["refuses", "fails", "is silent"])
def test_complete_entry_without_a_key(role: Role, failure: str, tmp_path: Path) -> None:
    """What the cache has completely is read, whatever happens to the service for keys."""
    with opened(role.url, tmp_path, deadlines=DEADLINES) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
    asked = len(role.store.headers)
    role.service.is_silent = failure == "is silent"
    role.service.status = 404 if failure == "refuses" else 503
    with opened(role.url, tmp_path, deadlines=DEADLINES) as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
    assert len(role.store.headers) == asked


@pytest.fixture
def firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a directory in place of that with the identification of the machine."""
    directory = tmp_path / "dmi"
    directory.mkdir()
    monkeypatch.setattr("qedfuse.remote.keyservices._DMI", str(directory))
    _firmware_text.cache_clear()
    yield directory
    _firmware_text.cache_clear()


def test_a_machine_is_identified_once(
    firmware: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A refused key of a machine is replaced, although the sandbox hides what the machine is."""
    vendor = firmware / "sys_vendor"
    vendor.write_text("Amazon EC2\n")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with (
        giving_keys() as service,
        serving(CONTENT, certificate) as store,
        proxying({f"{AMAZON}:443": store.port, "169.254.169.254": service.port}) as proxy,
    ):
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        with opened("s3://images/disk.qed", tmp_path / "cache") as file:
            vendor.unlink()
            store.required = "Credential=KEY2/"
            assert read(file, 0, len(CONTENT)) == CONTENT
        assert all("Credential=KEY" in text for text in store.authorizations)


@pytest.mark.usefixtures("bare_environment")
def test_an_unreadable_file_of_amazons_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the file with the key cannot be read any more, requests are signed with the last key."""
    file = tmp_path / "home/.aws/credentials"
    file.parent.mkdir(parents=True)
    file.write_text("[default]\naws_access_key_id = KEY1\naws_secret_access_key = secret\n")
    with serving(CONTENT) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.port}")
        with opened("s3://images/disk.qed", tmp_path / "cache") as file_on_server:
            file.unlink()
            file.mkdir()
            store.faults.append("status 403")
            assert read(file_on_server, 0, len(CONTENT)) == CONTENT
        assert store.struck["status 403"] == 1
        assert all("Credential=KEY1/" in text for text in store.authorizations)
        with pytest.raises(RemoteError, match=r"\.aws/credentials: Is a directory"):
            opened("s3://images/disk.qed", None).__enter__()


CONTAINER_FILE: Final = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
FULL_URI: Final = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
IDENTITY: Final = "AWS_WEB_IDENTITY_TOKEN_FILE"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        (
            {FULL_URI: "http://127.0.0.1:9/key"},
            f"found {FULL_URI} alone, expected {FULL_URI} and {CONTAINER_FILE}",
        ),
        (
            {FULL_URI: "http://127.0.0.1:9/key", CONTAINER_FILE: "/nonexistent/token"},
            f"{CONTAINER_FILE}: /nonexistent/token: No such file or directory",
        ),
        (
            {IDENTITY: "/dev/null"},
            f"found {IDENTITY} alone, expected {IDENTITY} and AWS_ROLE_ARN",
        ),
        (
            {IDENTITY: "/nonexistent/token", "AWS_ROLE_ARN": "arn"},
            f"{IDENTITY}: /nonexistent/token: No such file or directory",
        ),
        (
            {IDENTITY: "/dev/null", "AWS_ROLE_ARN": "arn", "AWS_ENDPOINT_URL_STS": "http://h/"},
            "AWS_ENDPOINT_URL_STS: found another scheme, expected https",
        ),
    ],
)
def test_incomplete_configuration_of_a_role(
    variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role whose configuration is not complete is refused, and no other role is used instead."""
    with giving_keys() as service, serving(CONTENT) as store:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", service.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.port}")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RemoteError) as caught, opened("s3://images/disk.qed", None):
            pass
        assert str(caught.value) == f"s3://images/disk.qed: credentials: {reason}"
        assert caught.value.errno == errno.EINVAL
        assert (service.requests, store.headers) == ([], [])
