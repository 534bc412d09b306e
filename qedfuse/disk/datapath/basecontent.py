"""The content of the bases for clusters that a write covers only in part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import QedError
from qedfuse.hostio.readonlyfile import ReadOnlyFile
from qedfuse.hostio.serversilence import Fill

if TYPE_CHECKING:
    from collections.abc import Collection

    from qedfuse.disk.lookup.chain import Chain
    from qedfuse.errors import RemoteError
    from qedfuse.hostio.serversilence import ServerSilence

_POLL_SECONDS: Final = 0.05
"""Interval at which a fill checks whether it must give up."""


class BaseContent:
    """Reads the bases of a chain for writes.

    Such a read is a fill (`qedfuse.hostio.serversilence`).  If a fill has just failed because its
    server was silent, a fill that waits for this server gives up early.
    """

    def __init__(self, chain: Chain) -> None:
        """Read the bases of ``chain``."""
        self._chain = chain
        files = [layer.file for layer in chain.layers[1:]]
        found = [file.silence for file in files if isinstance(file, ReadOnlyFile)]
        self._silences = [silence for silence in found if silence is not None]

    async def read(self, start: int, length: int) -> bytes | bytearray:
        """Return the bytes of the bases for a guest range.

        Raises:
            RemoteError: A server cannot be reached, refuses, or does not answer in time.
            HostError: A base cannot be read.
            CorruptImageError: A table entry of a base is not valid.
        """
        if not length:
            return b""
        fill = Fill()
        with fill.running():
            limited = [silence for silence in self._silences if silence.is_recent]
            if not limited:
                return await self._chain.read(start, length, depth=1)
            return await self._read_limited(start, length, fill, limited)

    async def _read_limited(
        self, start: int, length: int, fill: Fill, limited: Collection[ServerSilence]
    ) -> bytes | bytearray:
        """Return the bytes for a fill, which gives up if it waits too long for a silent server."""
        result: bytes | bytearray | QedError = b""  # always replaced

        async def watch(scope: trio.CancelScope) -> None:
            nonlocal result
            failure: RemoteError | None = None
            while failure is None:
                await trio.sleep(_POLL_SECONDS)
                failure = fill.give_up(limited)
            result = failure
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            try:
                result = await self._chain.read(start, length, depth=1)
            except QedError as error:  # the nursery would wrap it
                result = error
            nursery.cancel_scope.cancel()
        try:
            if isinstance(result, QedError):
                raise result
            return result
        finally:
            # The error must not refer to this frame, which refers to the error.
            del result
