"""A real web server of the tests: nginx with a certificate of the tests' own."""

from __future__ import annotations

import os
import pwd
import subprocess
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.support.servers import free_ports, is_listening, missing_programs, running, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_START_SECONDS: Final = 30.0


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


def why_no_nginx() -> str:
    """Return why nginx cannot be started here; empty if it can."""
    missing = missing_programs("nginx", "openssl")
    return f"not installed: {', '.join(missing)}" if missing else ""


@contextmanager
def serving_nginx(directory: Path) -> Iterator[Nginx]:
    """Run a server in a new directory for the block."""
    files = directory / "files"
    files.mkdir(parents=True)
    certificate = directory / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-keyout", directory / "key.pem", "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    https, http = free_ports(2)
    settings = directory / "nginx.conf"
    settings.write_text(_settings(directory, https, http))
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    command = ["nginx", "-p", str(directory), "-c", str(settings)]
    with (
        (directory / "nginx.log").open("wb") as log,
        running(command, log, environment),
    ):
        wait_for(lambda: is_listening(http), _START_SECONDS, directory)
        yield Nginx(
            files,
            f"https://localhost:{https}",
            f"http://127.0.0.1:{http}",
            certificate,
            directory / "access.txt",
        )


def _settings(directory: Path, https: int, http: int) -> str:
    """Return the configuration file; all that the server writes is in ``directory``."""
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
            server {{
                listen 127.0.0.1:{https} ssl;
                listen 127.0.0.1:{http};
                server_name localhost;
                ssl_certificate {directory}/certificate.pem;
                ssl_certificate_key {directory}/key.pem;
                root {directory}/files;
            }}
        """
        )
        + places
        + "\n}\n"
    )
