"""Errors of requests: an exception becomes an errno for the kernel and a line in the log.

Each `Exception` that is not a FUSEError is converted to one, because it would end the mount for all
disks and users.

With a damaged image or a full host, every retry of a guest fails, so the log is rate-limited for
each disk.  The first 100 different messages are logged in full, each once.  All other errors are
only counted; at most one line per minute has their number and the last message.
"""

from __future__ import annotations

import errno
import functools
import logging
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import pyfuse3
import trio
from pyfuse3 import FUSEError

from qedfuse.errors import ForeignError, PastEndError, QedError, RemoteError
from qedfuse.mount.fuse.handles import HANDLE_FLAGS
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence

    from qedfuse.mount.fuse.exporteddisk import ExportedDisk

_log = logging.getLogger(__name__)

_MAX_MESSAGES_PER_DISK: Final = 100
"""Maximum number of messages that are logged in full for one disk."""
_SUMMARY_SECONDS: Final = 60.0
"""Minimum time between two summaries; the last one, at the end of the mount, does not wait."""
_MAX_SHOWN_BYTES: Final = 64
"""Maximum length of a byte string that the debug log shows in full."""

P = ParamSpec("P")
T = TypeVar("T")


class RequestErrors:
    """Converts exceptions of requests to errno values, and logs them at a limited rate."""

    def __init__(self, disks: Mapping[int, ExportedDisk]) -> None:
        """Handle errors of requests to ``disks``, a mapping from inode numbers to disks."""
        self._disks = disks
        self._logged: dict[int, set[str]] = {inode: set() for inode in disks}
        self._dropped: dict[int, int] = {}
        self._last_message: dict[int, str] = {}
        self._error_dropped = trio.Event()

    def to_errno(self, inode: int, operation: str, error: Exception) -> int:
        """Log why a request failed, and return the errno for the kernel.

        Nothing is logged for a FUSEError, for a PastEndError, or for an error of a server that has
        been logged already.  An exception other than a QedError is a bug: its traceback is logged,
        and the errno is EIO.

        Args:
            inode: The inode number of the disk or directory to which the request was made.
            operation: The name of the request.
            error: The exception that the handler of the request has raised.
        """
        if isinstance(error, FUSEError):
            return error.errno
        if isinstance(error, QedError):
            self._log_error(inode, error)
            return error.errno
        self._log_bug(inode, operation, error)
        return errno.EIO

    def _log_error(self, inode: int, error: QedError) -> None:
        """Log the message of an error, except of a PastEndError or an error that was logged."""
        if isinstance(error, PastEndError) or (
            isinstance(error, RemoteError | ForeignError) and error.is_logged
        ):
            return
        message = str(error)
        if self._register(inode, message):
            _log.error("%s", message)

    def _log_bug(self, inode: int, operation: str, error: Exception) -> None:
        """Log an unexpected exception of the handler of ``operation``, with its traceback."""
        message = f"internal error in {operation}"
        details = f"{message}: {type(error).__name__}: {printable(str(error))}"
        if self._register(inode, details):
            _log.error("%s", message, exc_info=error)

    def _register(self, inode: int, message: str) -> bool:
        """Return whether the caller must log a message in full; if not, count it for a summary."""
        logged = self._logged.setdefault(inode, set())
        if message not in logged and len(logged) < _MAX_MESSAGES_PER_DISK:
            logged.add(message)
            return True
        self._dropped[inode] = self._dropped.get(inode, 0) + 1
        self._last_message[inode] = message
        self._error_dropped.set()
        return False

    async def log_summaries(self) -> None:
        """Log summaries of the errors that are not logged in full, until cancelled.

        A summary comes a minute after the first error that it reports, or when the task ends.
        """
        try:
            while True:
                await self._error_dropped.wait()
                await trio.sleep(_SUMMARY_SECONDS)
                self._summarize()
        finally:
            self._summarize()

    def _summarize(self) -> None:
        """Log for each disk how many errors since the last summary were not logged in full."""
        self._error_dropped = trio.Event()
        for inode, count in self._dropped.items():
            exported = self._disks.get(inode)
            name = "mount" if exported is None else exported.disk.name
            errors = "error" if count == 1 else "errors"
            _log.error(
                "%s: %d more %s not logged one by one, the last: %s",
                *(name, count, errors, self._last_message[inode]),
            )
        self._dropped.clear()
        self._last_message.clear()


class _Handlers(Protocol):
    """An object whose methods handle requests, with the attributes that `answered` uses."""

    debug: bool
    errors: RequestErrors


H = TypeVar("H", bound=_Handlers)


def answered(
    method: Callable[Concatenate[H, P], Awaitable[T]],
) -> Callable[Concatenate[H, P], Coroutine[Any, Any, T]]:
    """Decorate the handler of a request so that all its errors become FUSEErrors.

    A FUSEError and a cancellation are passed on; `RequestErrors.to_errno` converts any other
    exception.  If ``debug`` is set, each request and each FUSEError of ``method`` are logged.
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
            error_number = self.errors.to_errno(_inode_of(args), operation, error)
            raise FUSEError(error_number) from error

    return answer


def _inode_of(args: Sequence[object]) -> int:
    """Return the inode number in a request's first argument, or the root's if it has none."""
    first = args[0] if args else None
    return first & ~HANDLE_FLAGS if isinstance(first, int) else pyfuse3.ROOT_INODE


def _shown(args: Sequence[object]) -> str:
    """Return the integers and byte strings among the arguments as a text for the log."""
    return str(
        tuple(f"<{len(arg)} bytes>" if isinstance(arg, bytes) and len(arg) > _MAX_SHOWN_BYTES
              else arg for arg in args if isinstance(arg, int | bytes))
    )  # fmt: skip
