"""``-o metrics=ADDRESS``, and what SIGUSR1 and SIGUSR2 log."""

from __future__ import annotations

import http.client
import signal
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.errors import UsageError
from qedfuse.mount.system.listenaddress import ListenAddress
from tests.support import qemu
from tests.support.mounted import front, mounted, qedfuse, refused

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES: Final = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Make an empty image."""
    return qemu.create(tmp_path / "disk.qed", DISK_BYTES)


def free_port() -> int:
    """Return a port of loopback that no process uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    """Return the status and the body of an HTTP response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def test_metrics_are_served_on_loopback(image: Path, tmp_path: Path) -> None:
    """GET /metrics returns the counters; other requests are refused; silent clients are no harm."""
    port = free_port()
    with (
        mounted(image, tmp_path / "mnt", "-o", f"metrics={port}") as mountpoint,
        ExitStack() as stack,
    ):
        for _ in range(4):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        (mountpoint / "disk.raw").read_bytes()
        status, body = get(port, "/metrics")
        assert status == 200
        label = f'mountpoint="{mountpoint}",disk="disk.raw"'
        assert f'qedfuse_request_bytes_total{{{label},operation="read"}} {DISK_BYTES}\n' in body
        assert body.count("# TYPE qedfuse_requests_total counter\n") == 1
        assert get(port, "/metrics", "HEAD") == (200, "")
        assert get(port, "/other")[0] == 404
        assert get(port, "/metrics", "POST")[0] == 405
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"\0\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.0 400 ")
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /metrics HTTP/1.0\nHost: x\n\n")  # without CR, as from netcat
            assert client.recv(100).startswith(b"HTTP/1.0 200 ")


def test_metrics_are_served_at_a_path(image: Path, tmp_path: Path) -> None:
    """A socket that a killed server has left is replaced; the end of the mount removes it."""
    path = tmp_path / "metrics.sock"
    options = ("-o", f"metrics=unix:{path}")
    with front(*options, image, tmp_path / "mnt") as mount:
        mount.process.kill()
        mount.process.wait()
    assert path.exists()
    with mounted(image, tmp_path / "mnt", *options):
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.makefile().readline() == "HTTP/1.0 200 OK\n"
        other = qemu.create(tmp_path / "other.qed", DISK_BYTES)
        (tmp_path / "other").mkdir()
        expected = f"option metrics: unix:{path}: cannot listen: Address already in use"
        assert refused(*options, other, tmp_path / "other", code=2) == expected
    assert not path.exists()
    path.write_text("a file")
    expected = f"option metrics: unix:{path}: cannot listen: File exists"
    assert refused(*options, image, tmp_path / "mnt", code=2) == expected
    assert path.read_text() == "a file"
    expected = f"option metrics: unix:{tmp_path}: cannot listen: Is a directory"
    assert refused("-o", f"metrics=unix:{tmp_path}", image, tmp_path / "mnt", code=2) == expected


@pytest.mark.parametrize(
    "value", ["0", "65536", "0.0.0.0:9000", "example.org:9000", "127.0.0.256:9000", "unix:", "x"]
)
def test_other_addresses_are_refused(value: str, image: Path, tmp_path: Path) -> None:
    """An address that is neither a port of loopback nor a path is refused with one line."""
    (tmp_path / "mnt").mkdir()
    assert refused("-o", f"metrics={value}", image, tmp_path / "mnt", code=1) == (
        f"option metrics: found {value}, expected a port, 127.0.0.1:PORT, [::1]:PORT or unix:PATH"
    )


@pytest.mark.parametrize("path", [".", "..", "/tmp/", "a/..", "s" * 200 + "/"])  # noqa: S108
def test_a_directory_is_no_socket(path: str) -> None:
    """A path that can only be a directory's is refused before anything is mounted."""
    with pytest.raises(UsageError) as caught:
        ListenAddress.parse("metrics", f"unix:{path}")
    assert str(caught.value) == (
        f"option metrics: found unix:{path}, a directory, expected the path of a socket"
    )


def test_the_name_of_a_socket_has_a_limit(image: Path, tmp_path: Path) -> None:
    """A name of 82 bytes is accepted in a directory with a long path, one of 83 is refused."""
    directory = tmp_path / ("d" * 200)
    directory.mkdir()
    path = directory / ("s" * 82)
    with mounted(image, tmp_path / "mnt", "-o", f"metrics=unix:{path}"):
        assert path.is_socket()
    assert refused("-o", f"metrics=unix:{path}s", image, tmp_path / "mnt", code=1) == (
        "option metrics: found the name of a socket of 83 bytes, expected at most 82 bytes"
    )


def test_signals_log_a_summary_and_the_tasks(image: Path, tmp_path: Path) -> None:
    """SIGUSR1 logs one line, SIGUSR2 also a line for each task; the mount goes on."""
    with front(image, tmp_path / "mnt") as mount:
        content = (mount.mountpoint / "disk.raw").read_bytes()
        mount.signal(signal.SIGUSR1)
        line = mount.read_line()
        assert line.startswith(f"qedfuse: {mount.mountpoint}: up ")
        assert "disks 1; read " in line
        assert "(1.0 MiB, " in line
        mount.signal(signal.SIGUSR2)
        assert mount.read_line().startswith(f"qedfuse: {mount.mountpoint}: up ")
        lines = [mount.read_line()]
        while not lines[-1].startswith("qedfuse: tasks: "):
            lines.append(mount.read_line())
        assert any("log_on_signals (diagnostics.py:" in line for line in lines)
        assert lines[-1] == f"qedfuse: tasks: {len(lines) - 1}\n"
        assert (mount.mountpoint / "disk.raw").read_bytes() == content
        assert qedfuse("umount", mount.mountpoint).returncode == 0
        assert mount.finish()[0] == 0
