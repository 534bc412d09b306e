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


class Turn:
    """The requests that began between two calls of `Grace.turn`."""

    __slots__ = ("closed", "ended", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.closed = False
        self.ended: trio.Event | None = None


class Grace:
    """Counts requests by the turn in which they began."""

    def __init__(self) -> None:
        """Begin the first turn."""
        self._turns = deque([Turn()])

    def enter(self) -> Turn:
        """Count a request in; hand the answer to `leave` when it has ended."""
        turn = self._turns[-1]
        turn.requests += 1
        return turn

    def leave(self, turn: Turn) -> None:
        """Count a request out."""
        turn.requests -= 1
        if turn.closed and not turn.requests:
            self._pass()

    def turn(self) -> Turn:
        """End the present turn and give it; `over` tells when its requests have ended."""
        turn = self._turns[-1]
        turn.closed = True
        self._turns.append(Turn())
        self._pass()
        return turn

    def _pass(self) -> None:
        """Take out turns that are over, the oldest first."""
        while self._turns[0].closed and not self._turns[0].requests:
            turn = self._turns.popleft()
            if turn.ended is not None:
                turn.ended.set()

    def over(self, turn: Turn) -> bool:
        """Tell whether all requests of a turn, and of those before it, have ended."""
        return turn not in self._turns

    async def wait(self, turn: Turn) -> None:
        """Return when `over` is true; not to be called from within a request."""
        if self.over(turn):
            return
        if turn.ended is None:
            turn.ended = trio.Event()
        await turn.ended.wait()
