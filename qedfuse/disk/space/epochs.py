"""Which requests are under way, so that no cluster is used again underneath one.

A request looks up where its bytes are and then waits for the host.  Meanwhile the
cluster may lose its reference.  What lost its reference may be used again only when all
requests have ended that began before: they may still read or write there.  Requests
that begin later do not find it any more.

Requests are counted by the *turn* in which they began.  Nothing here waits while a
request is under way, except who asked to.
"""

from __future__ import annotations

from collections import deque

import trio


class Epoch:
    """The requests that began between two calls of `Epochs.advance`."""

    __slots__ = ("closed", "ended", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.closed = False
        self.ended: trio.Event | None = None


class Epochs:
    """Counts requests by the turn in which they began."""

    def __init__(self) -> None:
        """Begin the first turn."""
        self._epochs = deque([Epoch()])

    def enter(self) -> Epoch:
        """Count a request in; hand the answer to `leave` when it has ended."""
        epoch = self._epochs[-1]
        epoch.requests += 1
        return epoch

    def leave(self, epoch: Epoch) -> None:
        """Count a request out."""
        epoch.requests -= 1
        if epoch.closed and not epoch.requests:
            self._pass()

    def advance(self) -> Epoch:
        """End the present turn and give it; `is_drained` tells when its requests have ended."""
        epoch = self._epochs[-1]
        epoch.closed = True
        self._epochs.append(Epoch())
        self._pass()
        return epoch

    def _pass(self) -> None:
        """Take out turns that are over, the oldest first."""
        while self._epochs[0].closed and not self._epochs[0].requests:
            epoch = self._epochs.popleft()
            if epoch.ended is not None:
                epoch.ended.set()

    def is_drained(self, epoch: Epoch) -> bool:
        """Tell whether all requests of a turn, and of those before it, have ended."""
        return epoch not in self._epochs

    async def wait(self, epoch: Epoch) -> None:
        """Return when `is_drained` is true; not to be called from within a request."""
        if self.is_drained(epoch):
            return
        if epoch.ended is None:
            epoch.ended = trio.Event()
        await epoch.ended.wait()
