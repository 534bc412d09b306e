"""What a store's redirection to another host can do, and what the other host then gets.

The client for stores follows redirections and cannot be kept from it.  docs/security.md states what
these tests show.
"""

from __future__ import annotations

import base64
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from qedfuse.errors import RemoteError
from qedfuse.remote.address import parse_address
from qedfuse.remote.client import ClientOptions
from qedfuse.remote.upload import Upload
from tests.support.proxies import proxying
from tests.support.remotes import DEADLINES, opened, read, some_bytes
from tests.support.webserver import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.webserver import WebServer

CONTENT: Final = some_bytes(1)
KEY: Final = base64.b64encode(bytes(range(32))).decode()
SECRET: Final = "hush-hush"  # noqa: S105  made up
UPLOAD: Final = (
    b"<InitiateMultipartUploadResult><UploadId>one</UploadId></InitiateMultipartUploadResult>"
)
URLS: Final = {scheme: f"{scheme}://images/disk.qed" for scheme in ("s3", "gs", "az")}

pytestmark = pytest.mark.usefixtures("bare_environment")


class Zeros:
    """The content of an upload, of any length."""

    def read_blocking(self, offset: int, view: memoryview) -> int:  # noqa: ARG002  the protocol
        """Fill the view with zeros."""
        view[:] = bytes(len(view))
        return len(view)


class Request(NamedTuple):
    """A request that a server of `redirecting` got.

    Attributes:
        method: The method.
        path: The path with the query.
        body_bytes: Length of the body.
    """

    method: str
    path: str
    body_bytes: int


@contextmanager
def redirecting(status: int, target: str) -> Iterator[tuple[str, list[Request]]]:
    """Redirect each PUT; yield the URL and the requests.  There is no object, but an upload."""
    requests: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            requests.append(Request(self.command, self.path, len(self.rfile.read(length))))
            body = UPLOAD if self.command == "POST" else b""
            statuses = {"PUT": status, "POST": 200, "DELETE": 204}
            self.send_response(statuses.get(self.command, 404))
            self.send_header("Location", target)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815  names of the base class

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def redirected(certificate: Path | None = None) -> Iterator[tuple[WebServer, WebServer]]:
    """Run a store that redirects each request to another server; yield both."""
    with serving(CONTENT) as other, serving(CONTENT, certificate) as server:
        server.always, server.heads_fail = "redirect elsewhere", True
        server.elsewhere = other.url
        yield server, other


def test_a_store_with_tls_leads_to_no_server_without_tls(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A redirection from https:// to http:// ends without a request to the other server."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with redirected(certificate) as (server, other):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.port}")
        with pytest.raises(RemoteError), opened(URLS["s3"], None, deadlines=DEADLINES):
            pass
        assert server.struck["redirect elsewhere"]
        assert other.headers == []


def test_all_proxy_covers_a_redirection_to_tls(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A redirection from http:// to https:// ends at the proxy of ALL_PROXY."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving(CONTENT, certificate) as other, serving(CONTENT) as server:
        server.always, server.heads_fail = "redirect elsewhere", True
        server.elsewhere = other.url
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        with proxying({f"127.0.0.1:{server.port}": server.port}) as proxy:
            monkeypatch.setenv("ALL_PROXY", proxy.url)
            with pytest.raises(RemoteError), opened(URLS["s3"], None, deadlines=DEADLINES):
                pass
        assert f"127.0.0.1:{other.port}" in proxy.refused
        assert other.headers == []


@pytest.mark.parametrize(
    ("scheme", "variables", "leaked"),
    [
        ("s3", {"AWS_SESSION_TOKEN": SECRET}, {"x-amz-security-token"}),
        (
            "s3",
            {"AWS_SERVER_SIDE_ENCRYPTION": "sse-c", "AWS_SSE_CUSTOMER_KEY_BASE64": KEY},
            {"x-amz-server-side-encryption-customer-key"},
        ),
        ("gs", {"GOOGLE_BEARER_TOKEN": SECRET}, set()),
        ("az", {"AZURE_STORAGE_TOKEN": SECRET}, set()),
        ("az", {"AZURE_STORAGE_ACCOUNT_KEY": KEY}, set()),
        ("az", {"AZURE_STORAGE_SAS_KEY": f"sv=2021&sig={SECRET}"}, {"referer"}),
    ],
)
def test_which_secrets_another_host_gets(
    scheme: str, variables: dict[str, str], leaked: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No header Authorization leaves the host of the store; some other secrets do."""
    with redirected() as (server, other):
        endpoint = f"http://127.0.0.1:{server.port}"
        for name in ("AWS_ENDPOINT_URL", "GOOGLE_BASE_URL", "AZURE_STORAGE_ENDPOINT"):
            monkeypatch.setenv(name, endpoint)
        given = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        for name, value in (given | {"AZURE_STORAGE_ACCOUNT_NAME": "me"} | variables).items():
            monkeypatch.setenv(name, value)
        with opened(URLS[scheme], None, deadlines=DEADLINES) as file:
            assert read(file, 0, 100) == CONTENT[:100]
        assert other.headers
        assert set(other.authorizations) == {""}
        found = {
            name.lower()
            for headers in other.headers
            for name, value in headers.items()
            if SECRET in value or KEY in value
        }
        assert found == leaked


def test_the_token_of_a_container_goes_to_no_other_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A redirection of the service for credentials is followed, without the container's token."""
    token = tmp_path / "token"
    token.write_text(SECRET)
    with redirected() as (service, other):
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.url.rpartition("/images")[0])
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", service.url)
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(token))
        with pytest.raises(RemoteError), opened(URLS["s3"], None, deadlines=DEADLINES):
            pass
        assert SECRET in service.authorizations
        assert other.headers
        assert not any(SECRET in value for found in other.headers for value in found.values())


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("size", [100, 20 << 20])
def test_no_content_of_an_upload_goes_to_another_host(
    status: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload fails if the store redirects it, and the other host gets no byte of the content."""
    with (
        redirecting(500, "") as (other, others),
        redirecting(status, f"{other}/images/disk.qed") as (endpoint, requests),
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        upload = Upload(
            parse_address(URLS["s3"]),
            Zeros(),
            size,
            ClientOptions(1.0, 5.0),
            overwrite=False,
            progress=None,
            retry_seconds=1.0,
        )
        with pytest.raises(RemoteError):
            upload.run()
        sent = [request for request in requests if request.method == "PUT"]
        assert sent
        assert all(request.body_bytes for request in sent)
        assert not any(request.body_bytes for request in others)
