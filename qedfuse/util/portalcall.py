"""Calls of async functions in the event loop of a portal, and their outcomes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

import trio

from qedfuse.util.latch import Outcome

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)

R = TypeVar("R")


class PortalClosedError(RuntimeError):
    """The portal is closing or closed, or its event loop runs in another process."""


def closed_error() -> PortalClosedError:
    """Return the error of a call whose portal is closing or closed."""
    return PortalClosedError(
        "the event loop that the call needs is ending, has ended, or runs in another process"
    )


class Call(Outcome[R]):
    """A call of an async function in the event loop, and its outcome.

    Attributes:
        scope: Cancels the call.
        has_begun: Whether the event loop has taken over the call.
    """

    def __init__(self, function: Callable[[], Awaitable[R]]) -> None:
        """Prepare a call of ``function``."""
        super().__init__()
        self._function = function
        self.scope = trio.CancelScope()
        self.has_begun = False

    async def run(self) -> None:
        """Call the function, and keep its result or its error."""
        try:
            with self.scope:
                self.set_result(await self._function())
        except trio.Cancelled:
            self.set_error(closed_error())
            raise
        except Exception as error:  # noqa: BLE001  raised in the caller
            self.set_error(error)
        if self.scope.cancelled_caught and not self.is_set:
            self.set_error(closed_error())


class LoggedCall(Call[R]):
    """A call for whose outcome no caller waits."""

    def __init__(self, function: Callable[[], Awaitable[R]], name: str) -> None:
        """Prepare a call of ``function``; ``name`` precedes its error in the log."""
        super().__init__(function)
        self._name = name

    def set_error(self, error: BaseException) -> None:
        """Log the error."""
        _log.error("%s: %s", self._name, error)
        super().set_error(error)
