"""Which stores get the key of a role, and which services may give it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import obstore
import pytest

from qedfuse.errors import RemoteError
from qedfuse.remote.address import parse_address
from qedfuse.remote.client import ClientOptions, UnusableError
from qedfuse.remote.keyservices import _firmware_text, check_service, is_of_cloud
from qedfuse.remote.storesettings import make_store
from tests.support.keyservice import KeyService, giving_keys
from tests.support.proxies import proxying
from tests.support.remotes import DEADLINES, opened, read, some_bytes
from tests.support.webserver import WebServer, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENT: Final = some_bytes(0.5)
FIRMWARE: Final = {
    "s3": ("sys_vendor", "Amazon EC2"),
    "gs": ("product_name", "Google Compute Engine"),
    "az": ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"),
}
ENDPOINTS: Final = {
    "s3": "AWS_ENDPOINT_URL",
    "gs": "GOOGLE_BASE_URL",
    "az": "AZURE_STORAGE_ENDPOINT",
}
KEYS: Final = {
    "s3": {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"},
    "gs": {"GOOGLE_BEARER_TOKEN": "token"},
    "az": {"AZURE_STORAGE_TOKEN": "token"},
}
FULL_URI: Final = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
TOKEN_FILE: Final = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"  # noqa: S105  no secret

pytestmark = pytest.mark.usefixtures("bare_environment")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyService]:
    """Run a service for keys at the usual addresses of the clouds."""
    with giving_keys() as service:
        hosts = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
        with proxying(dict.fromkeys(hosts, service.port)) as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy.url)
            monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
            yield service


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """Run a store that belongs to no cloud, which the environment names."""
    with serving(CONTENT) as store:
        for name in ENDPOINTS.values():
            monkeypatch.setenv(name, f"http://127.0.0.1:{store.port}")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        yield store


@pytest.fixture(params=FIRMWARE)
def scheme(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Return the scheme of a cloud's stores; this is a machine of the cloud."""
    scheme = str(request.param)
    name, text = FIRMWARE[scheme]
    (tmp_path / "dmi").mkdir()
    (tmp_path / "dmi" / name).write_text(f"{text}\n")
    monkeypatch.setattr("qedfuse.remote.keyservices._DMI", str(tmp_path / "dmi"))
    _firmware_text.cache_clear()
    yield scheme
    _firmware_text.cache_clear()


def failure(url: str, **variables: str) -> str:
    """Return why a store of which a file has these variables cannot be configured."""
    options = ClientOptions(credentials=tuple(variables.items()))
    with pytest.raises(UnusableError) as caught:
        make_store(parse_address(url), options)
    return str(caught.value)


def test_the_key_of_a_machine_is_for_the_stores_of_its_cloud(
    scheme: str, service: KeyService, other: WebServer
) -> None:
    """A store that is not of the cloud gets unsigned requests, and the service is not asked."""
    with opened(f"{scheme}://images/disk.qed", None) as file:
        assert read(file, 0, 100) == CONTENT[:100]
    assert set(other.authorizations) == {""}
    assert service.requests == []


@pytest.mark.parametrize("scheme", ["gs"], indirect=True)
def test_the_default_file_of_google_is_for_stores_of_google(
    scheme: str, other: WebServer, tmp_path: Path
) -> None:
    """A store that is not of Google does not get the token of the user of Google's tools."""
    file = tmp_path / "home/.config/gcloud/application_default_credentials.json"
    file.parent.mkdir(parents=True)
    secrets = {"client_id": "id", "client_secret": "s", "refresh_token": "t"}
    file.write_text(json.dumps({"type": "authorized_user", **secrets}))
    with opened(f"{scheme}://images/disk.qed", None, deadlines=DEADLINES) as opened_file:
        assert read(opened_file, 0, 100) == CONTENT[:100]
    assert set(other.authorizations) == {""}


@pytest.mark.parametrize("scheme", ["az"], indirect=True)
def test_a_variable_of_azure_itself_is_no_wish_of_the_user(
    scheme: str, service: KeyService, other: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable that Azure sets has the key sent to Azure's stores only, and others precede."""
    url = f"{scheme}://images/disk.qed"
    with giving_keys() as another:
        monkeypatch.setenv("IDENTITY_ENDPOINT", f"{another.url}/msi")
        with opened(url, None) as file:
            assert read(file, 0, 100) == CONTENT[:100]
        assert set(other.authorizations) == {""}
        monkeypatch.setenv("AZURE_IDENTITY_ENDPOINT", f"{service.url}/msi")
        with opened(url, None) as file:
            assert read(file, 0, 100) == CONTENT[:100]
        assert other.authorizations[-1] == "Bearer bearer-1"
        assert another.requests == []
        assert service.keys == 1


@pytest.mark.parametrize("in_file", [False, True])
def test_a_variable_makes_requests_anonymous(
    scheme: str,
    service: KeyService,
    other: WebServer,
    monkeypatch: pytest.MonkeyPatch,
    *,
    in_file: bool,
) -> None:
    """With the variable against signatures, neither a key nor a role is used."""
    variables = {
        **KEYS[scheme],
        "AWS_METADATA_ENDPOINT": service.url,
        {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}[scheme] + "_SKIP_SIGNATURE": "true",
    }
    for name, value in () if in_file else variables.items():
        monkeypatch.setenv(name, value)
    options = ClientOptions(credentials=tuple(variables.items() if in_file else ()))
    store = make_store(parse_address(f"{scheme}://images/disk.qed"), options)
    assert store.identity.hint
    found = obstore.get_range(store.handle, "disk.qed", start=0, end=100)
    assert found.to_bytes() == CONTENT[:100]
    assert other.authorizations == [""]
    assert service.requests == []


@pytest.mark.parametrize("host", ["", "metadata.google.internal"])
@pytest.mark.parametrize("scheme", ["gs"], indirect=True)
def test_a_variable_asks_for_the_role(
    scheme: str,
    host: str,
    service: KeyService,
    other: WebServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a variable for the service, a store that is not of the cloud gets the key."""
    monkeypatch.setenv("GCE_METADATA_HOST", host)
    with opened(f"{scheme}://images/disk.qed", None) as file:
        assert read(file, 0, 100) == CONTENT[:100]
    assert set(other.authorizations) == {"Bearer bearer-1" if host else ""}
    assert service.keys == (1 if host else 0)


@pytest.mark.parametrize(
    ("scheme", "host"),
    [
        ("s3", "s3.amazonaws.com"),
        ("s3", "s3.eu-central-1.amazonaws.com"),
        ("s3", "s3-eu-west-1.amazonaws.com"),
        ("s3", "s3-fips.us-gov-west-1.amazonaws.com"),
        ("s3", "s3-fips.dualstack.us-east-1.amazonaws.com"),
        ("s3", "s3.dualstack.ap-southeast-2.amazonaws.com"),
        ("s3", "s3.cn-north-1.amazonaws.com.cn"),
        ("s3", "s3-accelerate.dualstack.amazonaws.com"),
        ("s3", "images.s3.eu-central-1.amazonaws.com"),
        ("s3", "point-123456789012.s3-accesspoint.eu-west-1.amazonaws.com"),
        ("s3", "s3express-use1-az5.us-east-1.amazonaws.com"),
        ("s3", "bucket.vpce-1a2b.s3.eu-central-1.vpce.amazonaws.com"),
        ("gs", "storage.googleapis.com"),
        ("gs", "storage.us-central1.rep.googleapis.com"),
        ("az", "account.blob.core.windows.net"),
        ("az", "account.privatelink.blob.core.windows.net"),
        ("az", "account.z01.blob.storage.azure.net"),
        ("az", "account.dfs.core.chinacloudapi.cn"),
    ],
)
def test_hosts_of_clouds(scheme: str, host: str) -> None:
    """The endpoints that the clouds document are their own, in any case and at any port."""
    assert is_of_cloud(scheme, f"https://{host}")
    assert is_of_cloud(scheme, f"https://{host.upper()}:8443/path")


@pytest.mark.parametrize(
    ("scheme", "host"),
    [
        ("s3", "ec2-203-0-113-25.compute-1.amazonaws.com"),
        ("s3", "ec2-203-0-113-25.eu-west-1.compute.amazonaws.com"),
        ("s3", "s3-store-1234.eu-west-1.elb.amazonaws.com"),
        ("s3", "s3-store-1234.elb.eu-west-1.amazonaws.com"),
        ("s3", "abc.execute-api.eu-west-1.amazonaws.com"),
        ("s3", "vpce-1.vpce-svc-2.eu-west-1.vpce.amazonaws.com"),
        ("s3", "s3.example.org"),
        ("s3", "s3amazonaws.com"),
        ("s3", "s3.amazonaws.com.example.org"),
        ("gs", "storage.googleapis.com.example.org"),
        ("gs", "storage.examplegoogleapis.com"),
        ("gs", "127.0.0.1"),
        ("az", "vm.westeurope.cloudapp.azure.com"),
        ("az", "account.blob.example.org"),
        ("az", "account.z6.web.core.windows.net"),
    ],
)
def test_hosts_of_others(scheme: str, host: str) -> None:
    """Hosts of the clouds' customers and of others do not count as the cloud's own stores."""
    assert not is_of_cloud(scheme, f"https://{host}")


@pytest.mark.parametrize(
    "url",
    [
        "https://keys.example.org/key?id=1",
        "http://127.0.0.1:41111/msi",
        "http://LOCALHOST",
        "http://[::1]:80/key",
        "http://169.254.170.23/v1/credentials",
        "http://[fd00:ec2::23]/v1/credentials",
        "http://[FD00:EC2:0::254]",
        "http://[fe80::1]/key",
        "http://metadata.google.internal",
    ],
)
def test_services_that_may_give_keys(url: str) -> None:
    """A service has TLS, or only this machine and its hypervisor can have its address."""
    check_service("NAME", url, allow_http=False)


@pytest.mark.parametrize(
    "url",
    [
        "http://keys.example.org/key",
        "http://10.0.0.1/key",
        "http://169.255.0.1/key",
        "http://[fd00:ec2::24]/key",
        "http://127.0.0.1.example.org/key",
        "http://metadata.google.internal.example.org/",
        "http://keys.example.org\\@127.0.0.1/key",
    ],
)
def test_services_that_need_allow_http(url: str) -> None:
    """A service on another machine without TLS is refused, unless the user allows it."""
    with pytest.raises(UnusableError, match=r"^credentials: NAME: found .* without TLS on another"):
        check_service("NAME", url, allow_http=False)
    check_service("NAME", url, allow_http=True)


@pytest.mark.parametrize(
    "url", ["", "keys", "ftp://h/", "s3://b", "http://", "http://127.0.0.1@evil.example/"]
)
def test_services_whose_url_is_not_valid(url: str) -> None:
    """A URL that names no web server is refused."""
    with pytest.raises(UnusableError, match=r"^credentials: NAME: "):
        check_service("NAME", url, allow_http=True)


@pytest.mark.parametrize(
    ("url", "variables"),
    [
        ("s3://b/k", {FULL_URI: "http://10.0.0.1/key"}),
        ("s3://b/k", {"AWS_METADATA_ENDPOINT": "http://10.0.0.1"}),
        ("az://c/k", {"AZURE_IDENTITY_ENDPOINT": "http://10.0.0.1/msi"}),
        ("az://c/k", {"AZURE_MSI_ENDPOINT": "http://10.0.0.1/msi"}),
        ("az://c/k", {"IDENTITY_ENDPOINT": "http://10.0.0.1/msi"}),
        ("az://c/k", {"AZURE_AUTHORITY_HOST": "http://10.0.0.1", "AZURE_CLIENT_SECRET": "s"}),
    ],
)
def test_no_service_without_tls_elsewhere(url: str, variables: dict[str, str]) -> None:
    """Each variable that names a service obeys the rule for endpoints without TLS."""
    name, address = next(iter(variables.items()))
    variables["AZURE_STORAGE_ACCOUNT_NAME"] = "account"
    host = address.removesuffix("/key").removesuffix("/msi")
    expected = f"credentials: {name}: found {host}/ without TLS on another machine, expected https:"
    assert failure(url, **variables).startswith(expected)


@pytest.mark.parametrize("name", ["GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"])
def test_no_service_of_google_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service for keys of Google has no TLS, so another machine needs ``allow_http``."""
    monkeypatch.setenv(name, "10.0.0.1:8080")
    assert failure("gs://b/k").startswith(f"credentials: {name}: found http://10.0.0.1:8080/ with")
    make_store(parse_address("gs://b/k"), ClientOptions(allow_http=True))
    # The service is not needed.
    options = ClientOptions(credentials=(("GOOGLE_SKIP_SIGNATURE", "true"),))
    assert make_store(parse_address("gs://b/k"), options).identity.hint


def test_a_container_has_no_other_host() -> None:
    """A relative URL of the service for keys cannot replace the host."""
    name = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"
    text = failure("s3://b/k", **{name: "@example.org/key"})
    assert text == f"credentials: {name}: found @example.org/key, expected a path with / first"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"token\n", "found a control character, such as the end of a line, expected none"),
        (
            b"a\r\nX-Header: b",
            "found a control character, such as the end of a line, expected none",
        ),
        (b"\xff", "found bytes that are not UTF-8, expected text"),
        (b"a" * ((1 << 20) + 1), "found more than 1048576 bytes, expected no more"),
        (None, "found a FIFO, expected a regular file"),
    ],
)
def test_files_that_are_no_token(content: bytes | None, reason: str, tmp_path: Path) -> None:
    """A token that cannot be sent is refused, and a FIFO is not waited for."""
    token = tmp_path / "token"
    if content is None:
        os.mkfifo(token)
    else:
        token.write_bytes(content)
    text = failure("s3://b/k", **{FULL_URI: "http://127.0.0.1:9/key", TOKEN_FILE: str(token)})
    assert text == f"credentials: {TOKEN_FILE}: {token}: {reason}"


@pytest.mark.parametrize(
    ("url", "variables"),
    [
        ("s3://b/k", {"AWS_WEB_IDENTITY_TOKEN_FILE": "", "AWS_ROLE_ARN": "arn"}),
        ("gs://b/k", {"GOOGLE_APPLICATION_CREDENTIALS": ""}),
        ("s3://b/k", {"AWS_SHARED_CREDENTIALS_FILE": ""}),
    ],
)
def test_a_fifo_is_no_key(url: str, variables: dict[str, str], tmp_path: Path) -> None:
    """A FIFO in place of a file with a key is refused, and not waited for."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    variables = {name: value or str(fifo) for name, value in variables.items()}
    assert failure(url, **variables).endswith(f"{fifo}: found a FIFO, expected a regular file")


def test_no_file_of_amazons_tools() -> None:
    """With the empty device in place of the file of Amazon's tools, there is no key."""
    options = ClientOptions(
        credentials=(
            ("AWS_SHARED_CREDENTIALS_FILE", os.devnull),
            ("AWS_ENDPOINT_URL", "https://example.org"),
        )
    )
    assert make_store(parse_address("s3://b/k"), options).identity.hint


@pytest.mark.expect_log("reading it from the cache")
def test_complete_entry_with_a_bad_token(
    service: KeyService, other: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cache has completely is read, although the token cannot be sent."""
    token = tmp_path / "token"
    token.write_text("token")
    monkeypatch.setenv(FULL_URI, f"{service.url}/key")
    monkeypatch.setenv(TOKEN_FILE, str(token))
    with opened("s3://images/disk.qed", tmp_path / "cache") as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
    asked = len(other.headers)
    token.write_text("token\n")
    with opened("s3://images/disk.qed", tmp_path / "cache") as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
    assert len(other.headers) == asked


@pytest.mark.parametrize("form", ["http://LOCALHOST:{}", "HTTP://127.0.0.1:{}/%6Bey", "{}"])
def test_the_url_of_a_service_in_another_form(
    form: str,
    service: KeyService,
    other: WebServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A refusal of the service is recognised, however its URL is written."""
    service.status = 404
    token = tmp_path / "token"
    token.write_text("token")
    url = f"http://127.0.0.1:{service.port}?id=1" if form == "{}" else form.format(service.port)
    monkeypatch.setenv(FULL_URI, url)
    monkeypatch.setenv(TOKEN_FILE, str(token))
    expected = "refused: service for credentials: found HTTP status 404"
    with (
        pytest.raises(RemoteError, match=expected),
        opened("s3://images/disk.qed", None, deadlines=DEADLINES),
    ):
        pass
    assert service.requests
    assert other.headers == []


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://b/k", "AWS_METADATA_ENDPOINT"),
        ("s3://b/k", "AWS_ROLE_ARN"),
        ("s3://b/k", TOKEN_FILE),
        ("gs://b/k", "GCE_METADATA_HOST"),
        ("az://c/k", "IDENTITY_ENDPOINT"),
        ("az://c/k", "IDENTITY_HEADER"),
    ],
)
def test_a_variable_of_a_role_is_checked(
    url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable with a control character is refused; an empty one counts as not set."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv(name, "a\nb")
    assert failure(url).startswith(f"credentials: {name}: found a control character")
    monkeypatch.setenv(name, "")
    make_store(parse_address(url), ClientOptions())
    assert name not in os.environ


@pytest.mark.parametrize(
    ("url", "name"), [("s3://b/k", "AWS_IMDSV1_FALLBACK"), ("az://c/k", "AZURE_SKIP_SIGNATURE")]
)
def test_an_empty_switch(url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any empty variable of a store counts as not set, also one that only obstore knows."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv(name, "")
    options = replace(ClientOptions(), credentials=(("AWS_METADATA_ENDPOINT", "http://127.0.0.1"),))
    make_store(parse_address(url), options)
    assert name not in os.environ
