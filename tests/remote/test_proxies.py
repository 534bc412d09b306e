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


UNUSABLE: Final = {
    "socks5://127.0.0.1:9",
    "ftp://PROXY",
    "http://",
    "http:/PROXY",
    "PROXY:x",
    "http://:8080",
    "http://127.0.0.1:99999",
    "http://127.0.0.1:0",
    " http://PROXY",
    "http://PROXY ",
    "http://PROXY/path",
    "http://PROXY?query",
    "http://user@PROXY",
    "http://me too:hush@PROXY",
    "http://me%to:hush@PROXY",
    "http://user:hush@more@PROXY",
    "http://\xfcser:hush@PROXY",
    "http://127.0.0.\u0661:9",
    "http://[::1:9",
}


@pytest.fixture(params=URLS)
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of an object on another machine, which no test reaches."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://{HOST}")
    return URLS[request.param] if request.param == "s3" else f"https:{URLS[request.param]}"


def refusal(url: str) -> str:
    """Return the message of an opening that fails before any request."""
    with pytest.raises(RemoteError) as caught, opened(url, None, deadlines=DEADLINES):
        pass
    message = str(caught.value)
    assert message.startswith(f"{url}: proxy: found ")
    assert "attempts" not in message
    assert "hush" not in message
    return message.removeprefix(f"{url}: ")


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("value", sorted(UNUSABLE))
def test_an_unusable_proxy_is_not_passed_by(
    url: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that a client could ignore is refused, and no client connects directly."""
    monkeypatch.setenv(variable, value.replace("PROXY", "127.0.0.1:9"))
    assert refusal(url) == (
        f"proxy: found {variable} in the environment that is not a usable URL, expected "
        "http://HOST:PORT"
    )


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "all_proxy", "no_proxy"])
@pytest.mark.parametrize(("upper", "lower"), [("", "P"), ("P", ""), ("P", "Q")])
def test_two_values_of_a_proxy(
    url: str, variable: str, upper: str, lower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two spellings with two values are refused: each client would use another one."""
    values = {"P": "http://127.0.0.1:9", "Q": "http://127.0.0.1:10", "": ""}
    monkeypatch.setenv(variable.upper(), values[upper])
    monkeypatch.setenv(variable, values[lower])
    assert refusal(url) == (
        f"proxy: found {variable.upper()} and {variable} in the environment, expected "
        f"{variable.upper()} or {variable}, or both with one value"
    )


def test_a_proxy_in_mixed_case(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that only Python knows is refused."""
    monkeypatch.setenv("Https_Proxy", "http://127.0.0.1:9")
    assert refusal(url).startswith("proxy: found Https_Proxy in the environment, expected ")


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_beside_request_method(
    url: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable with which obstore ignores all proxies is refused beside a proxy."""
    monkeypatch.setenv("REQUEST_METHOD", "GET")
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    assert refusal(url).startswith(f"proxy: found REQUEST_METHOD beside {variable} in the ")


@pytest.mark.parametrize("client", URLS)
@pytest.mark.parametrize(
    "form", ["http://{}", "http://{}/", "HTTP://{}", "{}", "http://me:p%40s@{}", "me:pass@{}"]
)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_usable_forms_of_a_proxy(
    client: str, form: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both clients use a proxy whose value is accepted, also beside a value that is not used.

    With proxies for both schemes, the one for all schemes is not used, so it may have any value.
    """
    with serving(CONTENT) as server, proxying({HOST: server.port}) as proxy:
        value = form.format(f"{host}:{proxy.port}")
        for variable in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(variable, value)
        monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{HOST}")
        url = URLS[client] if client == "s3" else f"http:{URLS[client]}"
        options = RemoteOptions(deadlines=DEADLINES, allow_http=True)
        file = open_remote(parse_address(url), options)
        try:
            assert read(file, 0, len(CONTENT)) == CONTENT
        finally:
            file.close()
        assert set(proxy.asked) == {HOST}


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


@pytest.mark.parametrize(
    ("proxy", "reason"),
    [
        ("127.0.0.1:9", "Connection refused"),
        (
            "nosuch.invalid:9",
            "found no address of the host (Name or service not known), expected one",
        ),
    ],
)
def test_a_proxy_that_cannot_be_reached(
    url: str, proxy: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both clients name the proxy, so that its failure is not mistaken for one of the server."""
    monkeypatch.setenv("ALL_PROXY", f"http://{proxy}")
    with pytest.raises(RemoteError) as caught, opened(url, None, deadlines=DEADLINES):
        pass
    assert str(caught.value).startswith(f"{url}: proxy: {reason} (attempts: ")


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
