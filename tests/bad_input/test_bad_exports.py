"""Every row of the tables of NBD servers in docs/bad-input.md, with the real commands."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import programs, qemu
from tests.support.faultynbd import FaultyServer, serving_faulty, serving_nothing
from tests.support.mounted import front, is_mounted
from tests.support.nbdservers import serving_nbd, why_no_server
from tests.support.nginx import make_certificate
from tests.support.servers import missing_programs

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB: Final = 1 << 20
TABLE: Final = (Path(__file__).parents[2] / "docs" / "bad-input.md").read_text("utf-8")
MAX_SECONDS: Final = 30.0
"""Each command must end within this time, on a machine that is busy."""
OPTIONS: Final = ("remote-timeout=1.5", "remote-attempt-timeout=1")
PATIENT: Final = ("remote-timeout=25", "remote-attempt-timeout=25")
"""Options for servers that answer: on a busy machine TLS alone can take more than a second."""

needs_qemu = pytest.mark.skipif(bool(why_no_server("qemu-nbd")), reason="no qemu-nbd")
needs_nbdkit = pytest.mark.skipif(bool(why_no_server("nbdkit")), reason="no nbdkit")


def in_table(line: str, directory: Path) -> bool:
    """Return whether the tables have a line, with other names in it."""
    for name in ("socket", "faulty", "other"):
        line = line.replace(f"{directory}/{name}", "/run/nbd")
    line = re.sub(r"\(attempts: [1-9]\d*\)", "(attempts: 4)", line)
    line = line.replace("(attempts: 4)", "(attempts: 2)") if "to no request" in line else line
    return f"`{line}`" in TABLE or f"`{line}; " in TABLE


def run(program: str, *words: str) -> tuple[int, str]:
    """Run a command that ends soon; return its code and what it prints on stderr."""
    begin = time.monotonic()
    done = programs.run(program, *words, timeout=100)
    assert time.monotonic() - begin < MAX_SECONDS
    return done.returncode, done.stderr


def refused(url: str, directory: Path, code: int = 22, limits: tuple[str, ...] = OPTIONS) -> str:
    """Assert that qedimg and a mount refuse a URL with the same line, which the table has."""
    mountpoint = directory / "mnt"
    mountpoint.mkdir()
    options = [f"--{option}" for option in limits]
    found, line = run("qedimg", "convert", *options, "-O", "raw", url,
                      str(directory / "copy.raw"))  # fmt: skip
    assert found == code, line
    mounted = ",".join(limits).replace("-", "_")
    also_found, also_line = run("qedfuse", "-f", "-r", "-o", mounted, url, str(mountpoint))
    assert also_found == code, also_line
    assert not is_mounted(mountpoint)
    assert not (directory / "copy.raw").exists()
    text = line.removeprefix("qedimg: ").rstrip("\n")
    assert also_line == f"qedfuse: {text}\n"
    assert in_table(text, directory), text
    return text


def url_of(path: Path, *, scheme: str = "nbd+unix") -> str:
    """Return the URL of the export ``vm`` at a socket."""
    return f"{scheme}:///vm?socket={path}"


@contextmanager
def listening(path: Path, answer: bytes | None) -> Iterator[None]:
    """Accept connections; send ``answer`` and close, or wait if it is None."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        kept = []

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                kept.append(sock)
                if answer is not None:
                    with sock:
                        sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for sock in kept:
                sock.close()


def test_no_socket(tmp_path: Path) -> None:
    """A socket that does not exist."""
    refused(url_of(tmp_path / "other"), tmp_path)


def test_no_server(tmp_path: Path) -> None:
    """A socket at which no server listens."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "other"))
        refused(url_of(tmp_path / "other"), tmp_path)


def test_a_server_that_accepts_no_connection(tmp_path: Path) -> None:
    """A socket whose queue of connections stays full."""
    with serving_nothing(tmp_path):
        refused(url_of(tmp_path / "faulty"), tmp_path, limits=("remote-connect-timeout=0.1",))


def test_another_server(tmp_path: Path) -> None:
    """A server of another protocol."""
    with listening(tmp_path / "other", b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n"):
        refused(url_of(tmp_path / "other"), tmp_path)


@pytest.mark.parametrize("answer", [None, b"", b"NBDMAGIC"])
def test_a_server_that_does_not_greet(tmp_path: Path, answer: bytes | None) -> None:
    """A server that says nothing, or closes the connection."""
    with listening(tmp_path / "other", answer):
        refused(url_of(tmp_path / "other"), tmp_path)


@needs_qemu
def test_what_qemu_refuses(tmp_path: Path) -> None:
    """An export that does not exist, and TLS that is not configured."""
    image = tmp_path / "raw"
    image.write_bytes(bytes(MIB))
    with serving_nbd(tmp_path, "qemu-nbd", "-r", "-f", "raw", "-x", "other", image):
        refused(url_of(tmp_path / "socket"), tmp_path, 26, limits=PATIENT)
        (tmp_path / "mnt").rmdir()
        refused(url_of(tmp_path / "socket", scheme="nbds+unix"), tmp_path, 27, limits=PATIENT)


@needs_nbdkit
@pytest.mark.skipif(bool(missing_programs("openssl")), reason="no openssl")
def test_tls_is_required_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that requires TLS, and has a certificate of its own."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    certificate = make_certificate(tmp_path)
    for name in ("ca-cert", "server-cert"):
        (tmp_path / f"{name}.pem").write_bytes(certificate.read_bytes())
    (tmp_path / "key.pem").rename(tmp_path / "server-key.pem")
    words = ("--tls=require", f"--tls-certificates={tmp_path}", "memory", "1M")
    with serving_nbd(tmp_path, "nbdkit", *words):
        refused(url_of(tmp_path / "socket"), tmp_path, 27, limits=PATIENT)
        (tmp_path / "mnt").rmdir()
        refused(url_of(tmp_path / "socket", scheme="nbds+unix"), tmp_path, limits=PATIENT)


@pytest.mark.parametrize("query", ["", "?socket=/a&user=x"])
def test_a_query_that_is_not_valid(tmp_path: Path, query: str) -> None:
    """A URL without a socket, or with an unknown parameter."""
    refused(f"nbd+unix:///vm{query}", tmp_path, 1)


def test_an_export_that_is_too_short(tmp_path: Path) -> None:
    """An export that ends inside the tables of its image."""
    image = tmp_path / "vm.qed"
    qemu.create(image, 8 * MIB)
    with serving_faulty(tmp_path, image.read_bytes()[:66536]):
        refused(url_of(tmp_path / "faulty"), tmp_path, 12)


def test_an_export_in_another_format(tmp_path: Path) -> None:
    """A qcow2 image on a server, for which QEMU is not started."""
    image = tmp_path / "base.qcow2"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    with serving_faulty(tmp_path, image.read_bytes()):
        found, line = run("qedfuse", "-r", url_of(tmp_path / "faulty"), str(tmp_path))
    assert found == 1
    assert in_table(line.removeprefix("qedfuse: ").rstrip("\n"), tmp_path), line


CHANGES: Final = ("gone", "stall", "another cookie", "error", "other size", "no export")


def change(server: FaultyServer, fault: str) -> None:
    """Let the server make a mistake from now on."""
    if fault == "gone":
        server.stop()
    elif fault in {"other size", "no export"}:
        server.choose_connection = lambda _number: fault
        server.break_connections()
    else:
        server.choose_reply = lambda _number: fault


@pytest.mark.parametrize("fault", CHANGES)
def test_a_mount_whose_server_fails(tmp_path: Path, fault: str) -> None:
    """Reads fail in bounded time with the errno of the table, and the mount ends as usual."""
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    expected = "ESTALE" if fault in {"other size", "no export"} else "EIO"
    with (
        serving_faulty(tmp_path, os.urandom(MIB)) as server,
        front("-r", "-o", "remote_timeout=2,remote_attempt_timeout=1", url_of(tmp_path / "faulty"),
              mountpoint) as mount,
    ):  # fmt: skip
        while not is_mounted(mountpoint):
            time.sleep(0.01)
        change(server, fault)
        begin = time.monotonic()
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            (mountpoint / "vm.raw").read_bytes()
        assert time.monotonic() - begin < MAX_SECONDS
        assert errno_name(caught.value) == expected
        line = mount.read_line()
        assert in_table(line.partition(": ")[2].partition("; reads fail")[0], tmp_path) or (
            fault == "error" and "found an error of the server" in line
        ), line
        begin = time.monotonic()
        mount.signal(signal.SIGTERM)
        mount.finish()
        assert time.monotonic() - begin < MAX_SECONDS


def errno_name(error: OSError) -> str:
    """Return the name of an error number."""
    return errno.errorcode[error.errno or 0]
