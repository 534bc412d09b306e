"""Looking up the addresses of a host, and connecting to one of them, in bounded time.

getaddrinfo(3) has no deadline, so it is called in a separate thread, which continues when the
caller's time is over.  Concurrent lookups of the same host and port share one thread.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from qedfuse.util.threads import start_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

SocketAddress = tuple[
    socket.AddressFamily, socket.SocketKind, int, str, tuple[str | int | bytes, ...]
]
"""What getaddrinfo(3) returns for one address."""


class _Lookup:
    """A lookup of one host, and its result.

    Attributes:
        ended: Set when the lookup has ended; the other attributes are then final.
        addresses: The addresses; empty before the end and after an error.
        error: The error of the lookup, or None.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self.ended = threading.Event()
        self.addresses: Sequence[SocketAddress] = ()
        self.error: OSError | None = None

    def run(self) -> None:
        """Look up the host, and store the result."""
        try:
            self.addresses = _lookup(self._host, self._port, 0)
        except OSError as error:
            self.error = error
        except UnicodeError:  # a label that is empty or too long
            self.error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        except MemoryError:
            self.error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


class Resolver:
    """Looks up the addresses of hosts.  Threads may use a resolver concurrently."""

    def __init__(self) -> None:
        self._reset()
        # If another thread held the lock during a fork, the lock would stay locked in the child.
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Forget all running lookups: in a forked child, lookups of the parent would never end."""
        self._lock = threading.Lock()
        self._running: dict[tuple[str, int], _Lookup] = {}

    def resolve(self, host: str, port: int, seconds: float) -> Sequence[SocketAddress]:
        """Return the addresses of a host, at least one.

        Raises:
            TimeoutError: The name servers did not answer within ``seconds``.
            OSError: The lookup failed, or no thread can be started.
        """
        host = host.strip("[]")
        with suppress(OSError, UnicodeError):
            return _lookup(host, port, socket.AI_NUMERICHOST)
        with self._lock:
            lookup = self._running.get((host, port))
            if lookup is None:
                lookup = self._start(host, port)
        if not lookup.ended.wait(seconds):
            raise TimeoutError
        if lookup.error is not None:
            raise type(lookup.error)(*lookup.error.args)
        return lookup.addresses

    def _start(self, host: str, port: int) -> _Lookup:
        """Start a lookup in a thread, and return it; the caller must hold the lock."""
        lookup = _Lookup(host, port)

        def run() -> None:
            try:
                lookup.run()
            finally:
                with self._lock:
                    del self._running[host, port]
                lookup.ended.set()

        start_thread(run, name="qedfuse-resolve")
        self._running[host, port] = lookup
        return lookup


RESOLVER: Final = Resolver()


def connect_to_any(addresses: Sequence[SocketAddress], end: float) -> socket.socket:
    """Connect to the first address that accepts; return the socket.

    The addresses are tried in their order.  Each gets an equal share of the time that is left.

    Args:
        addresses: The addresses.
        end: The deadline, as a value of ``time.monotonic()``.

    Raises:
        OSError: No address accepts; the error is that of the last address that was tried.
    """
    failure: OSError = TimeoutError()
    for number, (family, kind, protocol, _, address) in enumerate(addresses):
        left = end - time.monotonic()
        if left <= 0:
            break
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(left / (len(addresses) - number))
            sock.connect(address)
        except OSError as error:
            failure = error
            if sock is not None:
                sock.close()
        else:
            return sock
    raise failure


def _lookup(host: str, port: int, flags: int) -> Sequence[SocketAddress]:
    """Return what getaddrinfo(3) finds; without AI_NUMERICHOST it waits for name servers."""
    return socket.getaddrinfo(host, port, socket.AF_UNSPEC, socket.SOCK_STREAM, 0, flags)
