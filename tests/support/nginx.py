"""A real web server, nginx, and a cache in front of it; the certificates are made by the tests."""

from __future__ import annotations

import os
import pwd
import subprocess
import textwrap
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.support.sandbox import ROOT
from tests.support.servers import free_ports, is_listening, missing_programs, running, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_START_SECONDS: Final = 30.0
CACHE_SETTINGS: Final = ROOT / "examples" / "nginx-cache.conf"
"""The configuration of a cache that docs/remote.md recommends."""


@dataclass(frozen=True, slots=True)
class Nginx:
    """A running server.

    Attributes:
        directory: The files that it serves.
        https: The URL of this directory, with TLS.
        http: The URL of this directory, without TLS.
        certificate: The file with the certificate, for ``SSL_CERT_FILE``.
        log: A line for each request: method, path, range, status and bytes of the body.
    """

    directory: Path
    https: str
    http: str
    certificate: Path
    log: Path

    def requests(self, path: str) -> list[tuple[int, int]]:
        """Return status and length of the body of each answer for a path, once all are logged.

        nginx logs an answer after it has sent it, so a client may be faster.  A request that is
        made here comes after all others, because there is one worker.
        """
        marker = f"/logged-{len(self.log.read_bytes())}"
        try:
            urllib.request.urlopen(f"{self.http}{marker}").close()  # noqa: S310  loopback
        except urllib.error.HTTPError as error:
            error.close()
        wait_for(lambda: marker in self.log.read_text("utf-8"), _START_SECONDS, self.log.parent)
        lines = [line.split(" ") for line in self.log.read_text("utf-8").splitlines()]
        return [(int(words[-2]), int(words[-1])) for words in lines if words[1] == path]


def why_no_nginx() -> str:
    """Return why nginx cannot be started here; empty if it can."""
    missing = missing_programs("nginx", "openssl")
    return f"not installed: {', '.join(missing)}" if missing else ""


@contextmanager
def serving_nginx(directory: Path, *, max_rate: int | None = None) -> Iterator[Nginx]:
    """Run a server in a new directory for the block.

    A request gets 503 if it comes less than ``1 / max_rate`` seconds after the last one answered;
    so requests that come together are refused however few a slow machine makes in a second.
    """
    files = directory / "files"
    files.mkdir(parents=True)
    certificate = make_certificate(directory)
    https, http = free_ports(2)
    with _running(directory, _settings(directory, https, http, max_rate), http):
        yield Nginx(
            files,
            f"https://localhost:{https}",
            f"http://127.0.0.1:{http}",
            certificate,
            directory / "access.txt",
        )


@contextmanager
def serving_cache(directory: Path, origin: Nginx) -> Iterator[tuple[str, Path]]:
    """Run a cache of another server in a new directory for the block; yield URL and certificate.

    The configuration is the example's, with other names, ports and certificates.
    """
    directory.mkdir(parents=True)
    certificate = make_certificate(directory)
    (port,) = free_ports(1)
    text = CACHE_SETTINGS.read_text("utf-8")
    for old, new in {
        "/var/cache/nginx/images": f"{directory}/cache",
        "server images.example:443": f"server {origin.https.removeprefix('https://')}",
        " images.example;": " localhost;",
        "/etc/ssl/certs/ca-certificates.crt": str(origin.certificate),
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "/etc/ssl/cache.example.pem": str(certificate),
        "/etc/ssl/private/cache.example.key": f"{directory}/key.pem",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    with _running(directory, _frame(directory, text), port):
        yield f"https://localhost:{port}", certificate


@contextmanager
def serving_front(
    directory: Path, origin: str, port: int | None = None
) -> Iterator[tuple[str, Path]]:
    """Serve another server's content with TLS for the block; yield the URL and the certificate.

    Args:
        directory: Where nginx works; one that an earlier call has used keeps its certificate.
        origin: The URL of the server without TLS.
        port: The port with TLS; None for a free one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    certificate = directory / "certificate.pem"
    if not certificate.exists():
        make_certificate(directory)
    if port is None:
        (port,) = free_ports(1)
    servers = f"""
server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {certificate};
    ssl_certificate_key {directory}/key.pem;
    location / {{ proxy_pass {origin}; }}
}}
"""
    with _running(directory, _frame(directory, servers), port):
        yield f"https://localhost:{port}", certificate


def make_certificate(directory: Path, *names: str) -> Path:
    """Make a certificate for localhost and further names, and its key; return the certificate."""
    certificate = directory / "certificate.pem"
    subjects = ("DNS:localhost", "IP:127.0.0.1", *(f"DNS:{name}" for name in names))
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3"),
            *("-subj", "/CN=localhost", "-addext", f"subjectAltName={','.join(subjects)}"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-keyout", directory / "key.pem", "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    return certificate


@contextmanager
def _running(directory: Path, settings: str, port: int) -> Iterator[None]:
    """Run nginx in a directory for the block; it serves when the block begins."""
    path = directory / "nginx.conf"
    path.write_text(settings)
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    command = ["nginx", "-p", str(directory), "-c", str(path)]
    with (
        (directory / "nginx.log").open("wb") as log,
        running(command, log, environment),
    ):
        wait_for(lambda: is_listening(port), _START_SECONDS, directory)
        yield


def _settings(directory: Path, https: int, http: int, max_rate: int | None) -> str:
    """Return the configuration file of a server of files."""
    zone, limit = "", ""
    if max_rate is not None:
        zone = f"limit_req_zone $server_name zone=all:1m rate={max_rate}r/s;"
        limit = "limit_req zone=all nodelay;"
    return _frame(
        directory,
        f"""
{zone}
server {{
    {limit}
    listen 127.0.0.1:{https} ssl;
    listen 127.0.0.1:{http};
    server_name localhost;
    ssl_certificate {directory}/certificate.pem;
    ssl_certificate_key {directory}/key.pem;
    root {directory}/files;
}}
""",
    )


def _frame(directory: Path, servers: str) -> str:
    """Return a configuration file with some servers; nginx writes only to ``directory``."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    places = "\n".join(
        f"    {name}_temp_path {directory}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    first = f"user {user};\n" if user == "root" else ""
    return (
        first
        + textwrap.dedent(
            f"""\
        daemon off;
        worker_processes 1;
        pid {directory}/nginx.pid;
        error_log {directory}/error.log;
        events {{ worker_connections 512; }}
        http {{
            log_format line '$request_method $uri $http_range $status $body_bytes_sent';
            access_log {directory}/access.txt line;
            default_type application/octet-stream;
        """
        )
        + places
        + servers
        + "\n}\n"
    )
