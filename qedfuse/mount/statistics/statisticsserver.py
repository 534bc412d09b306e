"""Sending a mount's statistics to ``qedfuse stats``, through a socket beside the mount record."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from qedfuse.mount.statistics.connections import serve_connections
from qedfuse.mount.system.statisticssocket import peer_user

if TYPE_CHECKING:
    import socket

    import trio

    from qedfuse.mount.statistics.document import StatisticsSource


async def serve_statistics(listening: socket.socket, source: StatisticsSource) -> None:
    """Send the statistics to each client that runs as the mount's user or root, until cancelled.

    A client need not send anything.
    """
    users = (0, os.geteuid())

    async def send(stream: trio.SocketStream) -> None:
        if peer_user(stream.socket) in users:
            await stream.send_all(json.dumps(await source.document()).encode("ascii"))

    await serve_connections(listening, send)
