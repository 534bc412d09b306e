"""Epochs: which requests may still use a cluster that has lost its reference.

A request looks up where its bytes are, and then waits for the host.  Meanwhile the
cluster may lose its reference.  It may be used again only when all requests that began
before have ended, because they may still read or write there; requests that begin later
do not find it.  This is epoch-based reclamation (as in crossbeam), or the grace period of
read-copy-update.

Each request belongs to the epoch in which it began.  Nothing here waits, except `wait`.
"""

from __future__ import annotations

from collections import deque

import trio


class Epoch:
    """The requests that began between two calls of `Epochs.advance`."""

    __slots__ = ("closed", "drained", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.closed = False
        self.drained: trio.Event | None = None


class Epochs:
    """Counts requests by the epoch in which they began."""

    def __init__(self) -> None:
        """Begin the first epoch."""
        self._epochs = deque([Epoch()])

    def enter(self) -> Epoch:
        """Count a request that begins; return its epoch, for `leave`."""
        epoch = self._epochs[-1]
        epoch.requests += 1
        return epoch

    def leave(self, epoch: Epoch) -> None:
        """Count the end of a request that entered ``epoch``."""
        epoch.requests -= 1
        if epoch.closed and not epoch.requests:
            self._retire_drained()

    def advance(self) -> Epoch:
        """Begin a new epoch; return the one that ends, for `is_drained`."""
        epoch = self._epochs[-1]
        epoch.closed = True
        self._epochs.append(Epoch())
        self._retire_drained()
        return epoch

    def _retire_drained(self) -> None:
        """Remove closed epochs without requests, up to the first that still has some."""
        while self._epochs[0].closed and not self._epochs[0].requests:
            epoch = self._epochs.popleft()
            if epoch.drained is not None:
                epoch.drained.set()

    def is_drained(self, epoch: Epoch) -> bool:
        """Return whether all requests of an epoch, and of those before it, have ended."""
        return epoch not in self._epochs

    async def wait(self, epoch: Epoch) -> None:
        """Return when `is_drained` is true; a request must leave its epoch before it calls."""
        if self.is_drained(epoch):
            return
        if epoch.drained is None:
            epoch.drained = trio.Event()
        await epoch.drained.wait()
