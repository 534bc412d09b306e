"""Proxies that the environment names, and what they keep a store's redirections from."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.errors import RemoteError
from qedfuse.remote.address import parse_address
from qedfuse.remote.opening import open_remote
from qedfuse.remote.options import RemoteOptions
from qedfuse.remote.unitfile import UNIT_BYTES
from tests.support.disks import build_image
from tests.support.proxies import proxying
from tests.support.remotes import DEADLINES, opened, read, some_bytes
from tests.support.webserver import serving

if TYPE_CHECKING:
    from pathlib import Path

CONTENT: Final = some_bytes(2.5)
HOST: Final = "store.example"
URLS: Final = {"s3": "s3://images/disk.qed", "web": f"//{HOST}/images/disk.qed"}

pytestmark = pytest.mark.usefixtures("bare_environment")


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trust the certificate of the servers; return the certificate."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    return certificate


@pytest.mark.parametrize("client", URLS)
@pytest.mark.parametrize(
    ("variable", "scheme"),
    [
        *((name, "https") for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")),
        *((name, "http") for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")),
    ],
)
def test_a_proxy_of_the_environment_is_used(
    client: str, variable: str, scheme: str, trusted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both clients send all requests to the proxy that a variable names."""
    with serving(CONTENT, trusted if scheme == "https" else None) as server:
        host = f"{HOST}:443" if scheme == "https" else HOST
        with proxying({host: server.port}) as proxy:
            monkeypatch.setenv(variable, proxy.url)
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"{scheme}://{HOST}")
            url = URLS[client] if client == "s3" else f"{scheme}:{URLS[client]}"
            options = RemoteOptions(deadlines=DEADLINES, allow_http=True)
            file = open_remote(parse_address(url), options)
            try:
                assert read(file, 0, len(CONTENT)) == CONTENT
            finally:
                file.close()
        assert len(server.headers) >= 2
        assert set(proxy.asked) == {host}


def test_an_unusable_proxy_is_not_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that the web client cannot use is an error, and no reason to connect directly."""
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with pytest.raises(RemoteError) as caught, opened(f"https:{URLS['web']}", None):
        pass
    expected = "found a proxy in the environment that is not a usable URL (all_proxy)"
    assert str(caught.value) == f"https:{URLS['web']}: {expected}"


@pytest.mark.parametrize(
    ("status", "reason"),
    [(403, "a refusal to connect to the host"), (407, "a demand for a user and a password")],
)
def test_a_proxy_that_refuses_a_store(
    status: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message names the proxy, and what it refuses."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://{HOST}")
    with proxying({}) as proxy:
        proxy.refusal = status
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(RemoteError) as caught, opened(URLS["s3"], None, deadlines=DEADLINES):
            pass
    assert str(caught.value).startswith(f"{URLS['s3']}: proxy: found {reason} (attempts: ")


def test_a_proxy_refuses_the_redirection_of_a_store(
    trusted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A store's redirection to another machine ends at a proxy that refuses this machine.

    The same redirection is followed without the proxy, so the other machine can be reached.
    """
    image = bytes(build_image(1 << 20))
    url = URLS["s3"]
    with serving(image, trusted) as other, serving(image, trusted) as server:
        server.always, server.heads_fail = "redirect elsewhere", True
        server.elsewhere = other.url
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.port}")
        with opened(url, None, deadlines=DEADLINES) as file:
            assert read(file, 0, 100) == image[:100]
        assert other.headers
        asked = len(other.headers)
        with proxying({f"127.0.0.1:{server.port}": server.port}) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            with pytest.raises(RemoteError) as caught, opened(url, None, deadlines=DEADLINES):
                pass
            words = ("--remote-timeout=0.5", f"--cache-dir={tmp_path}")
            assert main(["info", *words, url]) == 22
        assert caught.value.errno == errno.EIO
        reason = f"{url}: proxy: found a refusal to connect to the host (attempts: "
        assert str(caught.value).startswith(reason)
        error = capsys.readouterr().err
        assert error.startswith(f"qedimg: {reason}")
        assert error.count("\n") == 1
        assert f"127.0.0.1:{other.port}" in proxy.refused
        assert len(other.headers) == asked


@pytest.mark.expect_log("proxy: found a refusal to connect to the host (attempts: ")
@pytest.mark.expect_log("answers again")
def test_a_redirection_of_a_store_during_a_read(
    trusted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A redirection that the proxy refuses later fails that range; then reads work again."""
    with serving(CONTENT, trusted) as other, serving(CONTENT, trusted) as server:
        server.elsewhere = other.url
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.port}")
        with proxying({f"127.0.0.1:{server.port}": server.port}) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            with opened(URLS["s3"], None, deadlines=DEADLINES) as file:
                assert read(file, 0, 100) == CONTENT[:100]
                server.always = "redirect elsewhere"
                with pytest.raises(RemoteError, match="proxy: found a refusal to connect"):
                    read(file, 2 * UNIT_BYTES, 100)
                server.always = None
                assert read(file, 0, len(CONTENT)) == CONTENT
        assert proxy.refused
        assert other.headers == []
