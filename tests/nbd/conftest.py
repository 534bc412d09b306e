"""What surrounds tests of NBD exports: a file with random bytes, and a certificate."""

from __future__ import annotations

import random
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SIZE: Final = (5 << 20) + 4096


@pytest.fixture(scope="session")
def content() -> bytes:
    """Return the bytes of `exported`."""
    return random.Random(1).randbytes(SIZE)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    """Return a raw file for servers."""
    path = tmp_path_factory.mktemp("exported") / "raw"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a certificate for ``localhost``, as nbdkit names its files."""
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", directory / "server-key.pem", "-out", directory / "server-cert.pem"),
        ],
        check=True,
        capture_output=True,
    )
    (directory / "ca-cert.pem").write_bytes((directory / "server-cert.pem").read_bytes())
    return directory
