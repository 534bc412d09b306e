"""Epochs: which requests may still use a cluster that has lost its reference.

A request looks up in which clusters its bytes are, and then waits for the host.  Meanwhile a
cluster that it has found may lose its reference.  So the cluster may be used again only when all
requests that began before the loss have ended.  Later requests do not find the cluster.

Each request belongs to the epoch in which it began.  The method is epoch-based reclamation, as in
read-copy-update (RCU).
"""

from __future__ import annotations

from collections import deque

import trio


class Epoch:
    """The requests that began between two calls of `Epochs.advance`.

    Attributes:
        closed: Whether the epoch has ended, so that no further request enters it.
        drained: The event that the requests of this epoch, and of the epochs before it, have
            ended; None until a task waits for it.
        requests: How many requests of this epoch have not ended yet.
    """

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
        """Count a request that begins; return its epoch, which it must pass to `leave`."""
        epoch = self._epochs[-1]
        epoch.requests += 1
        return epoch

    def leave(self, epoch: Epoch) -> None:
        """Count the end of a request that entered ``epoch``."""
        epoch.requests -= 1
        if epoch.closed and not epoch.requests:
            self._remove_drained()

    def advance(self) -> Epoch:
        """Begin a new epoch; return the epoch that ends now, for `is_drained` and `wait`."""
        epoch = self._epochs[-1]
        if not epoch.requests and len(self._epochs) > 1:
            # No request has begun since the last call, so this epoch can be the new one.  Without
            # that, the number of epochs would grow as long as an earlier request does not end.
            return self._epochs[-2]
        epoch.closed = True
        self._epochs.append(Epoch())
        self._remove_drained()
        return epoch

    def _remove_drained(self) -> None:
        """Remove the epochs before the first that is open or has requests; wake their waiters."""
        while self._epochs[0].closed and not self._epochs[0].requests:
            epoch = self._epochs.popleft()
            if epoch.drained is not None:
                epoch.drained.set()

    def is_drained(self, epoch: Epoch) -> bool:
        """Return whether all requests of an epoch, and of the epochs before it, have ended."""
        return epoch not in self._epochs

    async def wait(self, epoch: Epoch) -> None:
        """Wait until `is_drained` is true for ``epoch``.

        The caller must have left its own epoch.
        """
        if self.is_drained(epoch):
            return
        if epoch.drained is None:
            epoch.drained = trio.Event()
        await epoch.drained.wait()
