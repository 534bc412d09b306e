"""Errors of requests: an exception becomes an errno for the kernel and a line in the log.

Every exception is converted, because an exception that reached pyfuse3 would end the mount for
all disks and users.

A damaged image or a full host fails every retry of a guest, so the log is rate-limited for each
disk.  The first messages of a disk are logged in full, each message once.  For further errors,
one line per minute reports their number and the message of the last one.  So the log does not
grow with the guest's retries, and is not silent while requests still fail.
"""

from __future__ import annotations

import errno
import functools
import logging
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import pyfuse3
import trio
from pyfuse3 import FUSEError

from qedfuse.errors import PastEndError, QedError
from qedfuse.mount.fuse.exporteddisk import HANDLE_FLAGS
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence

    from qedfuse.mount.fuse.exporteddisk import ExportedDisk

_log = logging.getLogger(__name__)

_MAX_MESSAGES_PER_DISK: Final = 100
"""Most messages that are logged in full for one disk during a mount."""
_SUMMARY_SECONDS: Final = 60.0
"""Shortest time between two summaries of the errors that were not logged in full."""
_MAX_SHOWN_BYTES: Final = 64
"""Longest argument of a request that the debug log shows in full."""

P = ParamSpec("P")
T = TypeVar("T")


class RequestErrors:
    """Converts exceptions of requests to errno values, and logs them at a limited rate."""

    def __init__(self, disks: Mapping[int, ExportedDisk]) -> None:
        """Log errors of ``disks``, which are mapped by inode."""
        self._disks = disks
        self._logged: dict[int, set[str]] = {inode: set() for inode in disks}
        self._dropped: dict[int, int] = {}
        self._last: dict[int, str] = {}
        self._new = trio.Event()

    def to_errno(self, inode: int, operation: str, error: Exception) -> int:
        """Log why a request failed, and return the errno for the kernel.

        A FUSEError is not logged, because it says nothing but the errno.  A PastEndError is not
        logged, because it is a mistake of the program that made the request.  Any other QedError
        is logged with its message.  An exception of another type is a bug, so it is logged with
        its traceback, and the errno is EIO.

        Args:
            inode: The inode that the request is about.
            operation: The name of the request.
            error: What the handler of the request raised.
        """
        if isinstance(error, FUSEError):
            return error.errno
        if isinstance(error, QedError):
            self._log_error(inode, error)
            return error.errno
        self._log_bug(inode, operation, error)
        return errno.EIO

    def _log_error(self, inode: int, error: QedError) -> None:
        """Log an error of the disk, unless a write past its end is the only reason."""
        if isinstance(error, PastEndError):
            return
        message = str(error)
        if self._register(inode, message):
            _log.error("%s", message)

    def _log_bug(self, inode: int, operation: str, error: Exception) -> None:
        """Log an unexpected exception with its traceback."""
        message = f"internal error in {operation}"
        details = f"{message}: {type(error).__name__}: {printable(str(error))}"
        if self._register(inode, details):
            _log.error("%s", message, exc_info=error)

    def _register(self, inode: int, message: str) -> bool:
        """Register a message of a disk; return whether the caller must log it in full.

        If the result is False, the message is counted for the next summary.
        """
        logged = self._logged.setdefault(inode, set())
        if message not in logged and len(logged) < _MAX_MESSAGES_PER_DISK:
            logged.add(message)
            return True
        self._dropped[inode] = self._dropped.get(inode, 0) + 1
        self._last[inode] = message
        self._new.set()
        return False

    async def log_summaries(self) -> None:
        """Log the errors that are not logged in full, at most once a minute, until cancelled.

        When the task is cancelled, it logs the errors since the last summary.
        """
        try:
            while True:
                await self._new.wait()
                await trio.sleep(_SUMMARY_SECONDS)
                self._summarize()
        finally:
            self._summarize()

    def _summarize(self) -> None:
        """Log for each disk how many errors since the last summary were not logged in full."""
        self._new = trio.Event()
        for inode, count in self._dropped.items():
            exported = self._disks.get(inode)
            name = "mount" if exported is None else exported.disk.name
            errors = "error" if count == 1 else "errors"
            _log.error(
                "%s: %d more %s not logged one by one, the last: %s",
                *(name, count, errors, self._last[inode]),
            )
        self._dropped.clear()
        self._last.clear()


class _Handlers(Protocol):
    """The object whose methods handle requests, as far as `answered` uses it."""

    debug: bool
    errors: RequestErrors


H = TypeVar("H", bound=_Handlers)


def answered(
    method: Callable[Concatenate[H, P], Awaitable[T]],
) -> Callable[Concatenate[H, P], Coroutine[Any, Any, T]]:
    """Decorate the handler of a request so that FUSEError is the only exception it raises.

    Any other exception is logged and converted by `RequestErrors.to_errno`.  A cancellation is
    passed on.  If debugging, the request and a FUSEError are logged.
    """

    @functools.wraps(method)
    async def answer(self: H, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self.debug:
            _log.debug("%s%s", method.__name__, _shown(args))
        try:
            return await method(self, *args, **kwargs)
        except FUSEError as error:
            if self.debug:
                _log.debug("%s: %s", method.__name__, error)
            raise
        except Exception as error:
            operation = method.__name__.lstrip("_")
            number = self.errors.to_errno(_inode_of(args), operation, error)
            raise FUSEError(number) from error

    return answer


def _inode_of(args: Sequence[object]) -> int:
    """Return the inode that a request is about; the root if its arguments name none."""
    first = args[0] if args else None
    return first & ~HANDLE_FLAGS if isinstance(first, int) else pyfuse3.ROOT_INODE


def _shown(args: Sequence[object]) -> str:
    """Return the arguments of a request for the log; long data is shown by its length."""
    return str(
        tuple(f"<{len(arg)} bytes>" if isinstance(arg, bytes) and len(arg) > _MAX_SHOWN_BYTES
              else arg for arg in args if isinstance(arg, int | bytes))
    )  # fmt: skip
