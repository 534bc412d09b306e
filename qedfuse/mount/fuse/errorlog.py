"""The log of failed requests, rate-limited for each disk.

A damaged image or a full host fails as many requests as a guest sends.  The first errors
of a disk are logged one line each; of the others a line a minute gives the number and the
last one, so that the log neither grows with the guest's retries nor goes silent while
requests still fail.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import PastEndError, QedError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qedfuse.mount.fuse.exporteddisk import ExportedDisk

_log = logging.getLogger(__name__)

_MAX_LINES_PER_DISK: Final = 100
"""Different messages that are logged in full in the life of a mount."""
_SUMMARY_SECONDS: Final = 60.0
"""Shortest time between two summaries of the errors that were not logged in full."""


class RequestErrorLog:
    """Logs the errors of requests: each message once, and the number of the others."""

    def __init__(self, views: Mapping[int, ExportedDisk]) -> None:
        """Log for the disks ``views``, by inode."""
        self._views = views
        self._logged: dict[int, set[str]] = {inode: set() for inode in views}
        self._dropped: dict[int, int] = {}
        self._last: dict[int, str] = {}
        self._new = trio.Event()

    def error(self, inode: int, error: QedError) -> None:
        """Log what a request to the disk ``inode`` failed with."""
        if isinstance(error, PastEndError):
            return  # the caller's mistake, not the image's
        message = str(error)
        if self._is_new(inode, message):
            _log.error("%s", message)

    def bug(self, inode: int, operation: str, error: Exception) -> None:
        """Log an exception that nobody expected, with its traceback."""
        message = f"internal error in {operation}"
        details = f"{message}: {type(error).__name__}: {printable(str(error))}"
        if self._is_new(inode, details):
            _log.error("%s", message, exc_info=error)

    def _is_new(self, inode: int, message: str) -> bool:
        """Return whether to log a message in full; count it if not."""
        logged = self._logged.setdefault(inode, set())
        if message not in logged and len(logged) < _MAX_LINES_PER_DISK:
            logged.add(message)
            return True
        self._dropped[inode] = self._dropped.get(inode, 0) + 1
        self._last[inode] = message
        self._new.set()
        return False

    async def run(self) -> None:
        """Log the summaries until cancelled; what is left then is logged as well."""
        try:
            while True:
                await self._new.wait()
                await trio.sleep(_SUMMARY_SECONDS)
                self._summarize()
        finally:
            self._summarize()

    def _summarize(self) -> None:
        """Log for each disk how many errors have not been logged since the last summary."""
        self._new = trio.Event()
        for inode, count in self._dropped.items():
            view = self._views.get(inode)
            name = "mount" if view is None else view.disk.name
            errors = "error" if count == 1 else "errors"
            _log.error(
                "%s: %d more %s not logged one by one, the last: %s",
                *(name, count, errors, self._last[inode]),
            )
        self._dropped.clear()
        self._last.clear()
