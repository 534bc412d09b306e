"""The socket of the option ``metrics`` in the file system: who listens at the path."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest

from qedfuse.errors import HostError
from qedfuse.mount.system import listenaddress, statisticssocket
from qedfuse.mount.system.listenaddress import ListenAddress, Listener

if TYPE_CHECKING:
    from pathlib import Path


def assert_reachable(path: Path, listener: Listener) -> None:
    """Check that a connection to a path arrives at a listener."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listener.socket.accept()[0].close()


def assert_in_use(path: Path) -> None:
    """Check that a path is refused because a process listens there."""
    with pytest.raises(HostError, match="cannot listen: Address already in use") as caught:
        Listener(ListenAddress(path=str(path)))
    assert caught.value.errno == errno.EADDRINUSE


def put_stale(path: Path) -> None:
    """Make a socket on which no process listens."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def test_process_that_accepts_no_connection(tmp_path: Path) -> None:
    """A path whose process accepts nothing is refused; connect(2) would wait for that process."""
    path = tmp_path / "metrics"
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(str(path))
        server.listen(0)
        code = 0
        while not code:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)  # noqa: FBT003  its only parameter
            code = client.connect_ex(str(path))
        assert code == errno.EAGAIN, "the queue of connections is full"
        assert_in_use(path)
    assert path.exists()


@pytest.mark.parametrize("is_stale", [False, True])
def test_two_processes_that_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_stale: bool
) -> None:
    """Of two processes that find the path free, one listens there, and the other is refused."""
    path = tmp_path / "metrics"
    address = ListenAddress(path=str(path))
    if is_stale:
        put_stale(path)
    first: list[Listener] = []

    def start_first() -> None:
        monkeypatch.undo()
        first.append(Listener(address))

    def unlink_later(descriptor: int) -> bool:
        found = is_in_use(descriptor)
        start_first()
        return found

    def listen_later(directory: int, name: str) -> socket.socket:
        start_first()
        return listen(directory, name)

    is_in_use, listen = listenaddress._is_in_use, statisticssocket.listen
    if is_stale:
        monkeypatch.setattr(listenaddress, "_is_in_use", unlink_later)
    else:
        monkeypatch.setattr(listenaddress, "listen", listen_later)
    assert_in_use(path)
    with closing(first[0]):
        assert_reachable(path, first[0])


def test_close_keeps_the_socket_of_another_process(tmp_path: Path) -> None:
    """A listener removes only its own socket, not one that has replaced it."""
    path = tmp_path / "metrics"
    address = ListenAddress(path=str(path))
    former = Listener(address)
    path.unlink()
    with closing(Listener(address)) as present:
        former.close()
        assert_reachable(path, present)
    assert not os.path.lexists(path)
    Listener(address).close()
    assert not os.path.lexists(path)
