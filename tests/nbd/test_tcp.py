"""Exports on TCP ports: the host, the port and the name come from the URL, with and without TLS."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.errors import RemoteError
from qedfuse.nbd.export import open_export
from qedfuse.remote.address import parse_address
from qedfuse.remote.options import Deadlines
from tests.support.nbdservers import serving_nbd_tcp, why_no_server
from tests.support.servers import missing_programs

if TYPE_CHECKING:
    from pathlib import Path

DEADLINES: Final = Deadlines(connect_seconds=20, attempt_seconds=20, total_seconds=40)

needs_nbdkit = pytest.mark.skipif(bool(why_no_server("nbdkit")), reason="not installed: nbdkit")
needs_tls = pytest.mark.skipif(
    bool(missing_programs("nbdkit", "openssl")), reason="not installed: nbdkit or openssl"
)
needs_qemu_nbd = pytest.mark.skipif(
    bool(why_no_server("qemu-nbd")), reason="not installed: qemu-nbd"
)


def whole(url: str) -> bytes:
    """Return all bytes of an export."""
    file = open_export(parse_address(url), DEADLINES)
    try:
        buffer = bytearray(file.size())
        assert file.read_blocking(0, memoryview(buffer)) == len(buffer)
        return bytes(buffer)
    finally:
        file.close()


@needs_qemu_nbd
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_export_of_the_url_is_read(
    host: str, exported: Path, content: bytes, tmp_path: Path
) -> None:
    """All bytes are read by host name or address, and another export of the server is refused."""
    server = ("qemu-nbd", "-r", "-f", "raw", "-e", "8", "-x", "the disk", exported)
    with serving_nbd_tcp(tmp_path, *server) as port:
        assert whole(f"nbd://{host}:{port}/the%20disk") == content
        with pytest.raises(RemoteError, match=rf"^nbd://{host}:{port}/other: found no such export"):
            whole(f"nbd://{host}:{port}/other")


@needs_nbdkit
@pytest.mark.skipif(bool(missing_programs("qemu-io")), reason="not installed: qemu-io")
def test_what_another_client_has_written_is_read(tmp_path: Path) -> None:
    """What qemu-io writes to a disk in the memory of nbdkit is read; the rest reads as zeros."""
    written = ((65536, 70000, 0x41), ((3 << 20) - 7, 4096, 0x7A))
    expected = bytearray(4 << 20)
    words = ["qemu-io", "-f", "raw"]
    for offset, length, byte in written:
        expected[offset : offset + length] = bytes([byte]) * length
        words += ["-c", f"write -P {byte} {offset} {length}"]
    with serving_nbd_tcp(tmp_path, "nbdkit", "memory", str(len(expected))) as port:
        subprocess.run(
            [*words, f"nbd://127.0.0.1:{port}"], check=True, capture_output=True, timeout=60
        )
        assert whole(f"nbd://127.0.0.1:{port}") == expected


@needs_tls
def test_tls_uses_the_host_of_the_url(
    certificates: Path,
    exported: Path,
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The certificate must have the host of the URL, or the name in its parameter.

    The certificate is for ``localhost``.  Without TLS the server refuses.
    """
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca-cert.pem"))
    server = ("nbdkit", "--tls=require", f"--tls-certificates={certificates}", "file", exported)
    with serving_nbd_tcp(tmp_path, *server) as port:
        assert whole(f"nbds://localhost:{port}") == content
        assert whole(f"nbds://127.0.0.1:{port}/?tls-hostname=localhost") == content
        with pytest.raises(RemoteError, match=r"TLS: certificate: found IP address mismatch"):
            whole(f"nbds://127.0.0.1:{port}")
        with pytest.raises(RemoteError, match=r"TLS: certificate: found Hostname mismatch"):
            whole(f"nbds://localhost:{port}/?tls-hostname=example.com")
        with pytest.raises(RemoteError, match=r"found a server that requires TLS"):
            whole(f"nbd://localhost:{port}")
