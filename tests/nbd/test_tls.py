"""Exports with TLS: the certificate is verified, and nothing is sent without TLS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.errors import RemoteError
from qedfuse.nbd.export import open_export
from qedfuse.remote.address import parse_address
from qedfuse.remote.options import Deadlines
from tests.support.nbdservers import serving_nbd, why_no_server
from tests.support.servers import missing_programs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qedfuse.nbd.nbdfile import NbdFile

MISSING: Final = why_no_server("nbdkit") or ", ".join(missing_programs("openssl"))
DEADLINES: Final = Deadlines(20, 20, 40)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture
def socket_of_server(certificates: Path, exported: Path, tmp_path: Path) -> Iterator[Path]:
    """Run a server that requires TLS; return its socket."""
    words = ("nbdkit", "--tls=require", f"--tls-certificates={certificates}", "file", exported)
    with serving_nbd(tmp_path, *words):
        yield tmp_path / "socket"


def opened(url: str) -> NbdFile:
    """Open a URL."""
    return open_export(parse_address(url), DEADLINES)


def test_a_trusted_server_is_read(
    socket_of_server: Path, certificates: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short and long reads, in several connections, get the right bytes."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca-cert.pem"))
    file = opened(f"nbds+unix:///?socket={socket_of_server}")
    try:
        for offset, length in ((0, len(content)), (5, 1), (70_000, 4096)):
            buffer = bytearray(length)
            assert file.read_blocking(offset, memoryview(buffer)) == length
            assert buffer == content[offset : offset + length]
    finally:
        file.close()


def test_an_unknown_certificate_is_refused(
    socket_of_server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that no authority vouches for is refused, with the reason."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(RemoteError, match=r"TLS: certificate: found self.signed"):
        opened(f"nbds+unix:///?socket={socket_of_server}")


def test_a_certificate_of_another_host_is_refused(
    socket_of_server: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate must have the name of the host, or the one in the URL."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca-cert.pem"))
    with pytest.raises(RemoteError, match=r"TLS: certificate: found Hostname mismatch"):
        opened(f"nbds+unix:///?tls-hostname=example.com&socket={socket_of_server}")


def test_a_server_that_requires_tls_is_refused_without(socket_of_server: Path) -> None:
    """Without TLS the message names the scheme that has it."""
    with pytest.raises(
        RemoteError, match=r"found a server that requires TLS, expected a URL that begins with nbds"
    ):
        opened(f"nbd+unix:///?socket={socket_of_server}")
