"""Serving short connections beside the requests of a mount.

Both the number of connections and their duration are limited, so no client can stop the mount.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)

_MAX_CONNECTIONS: Final = 8
"""Maximum number of connections that are served at a time."""
_MAX_SECONDS: Final = 5.0
"""Maximum time for which a connection is served."""
_PAUSE_SECONDS: Final = 0.5
"""Pause after a failed accept(2), for example because no descriptor is free."""


async def serve_connections(
    listening: socket.socket, serve: Callable[[trio.SocketStream], Awaitable[None]]
) -> None:
    """Serve the connections of a listening socket until cancelled, and then close the socket.

    Args:
        listening: The socket, in non-blocking mode.
        serve: Serves one connection, which is closed after the call or after `_MAX_SECONDS`.  An
            exception does not affect other connections.
    """
    connections = 0

    async def run(connection: trio.socket.SocketType) -> None:
        nonlocal connections
        stream = trio.SocketStream(connection)
        try:
            with trio.move_on_after(_MAX_SECONDS):
                await serve(stream)
        except (trio.BrokenResourceError, OSError):
            pass  # the client has gone
        except Exception:  # noqa: BLE001  a bug must end neither the mount nor other connections
            _log.exception("internal error while statistics were sent")
        finally:
            connections -= 1
            connection.close()

    with trio.socket.from_stdlib_socket(listening) as accepting:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    connection, _address = await accepting.accept()
                except OSError:
                    await trio.sleep(_PAUSE_SECONDS)
                    continue
                if connections >= _MAX_CONNECTIONS:
                    connection.close()
                    continue
                connections += 1
                nursery.start_soon(run, connection)
