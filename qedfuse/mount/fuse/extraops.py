"""Loading the C extension that works beside pyfuse3, and connecting it with the handlers.

The extension adds fallocate(2) and lseek(2), and lets `DataRequests` answer reads, writes and
fsyncs before pyfuse3 gets them.  It interposes a function between pyfuse3 and libfuse (see
`_extraops.c`), so `qedfuse.mount` imports this module before pyfuse3.  The extension is optional.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING, Final

from qedfuse.mount.fuse.handles import FAST_LOOKUP_MASK
from qedfuse.util.extensions import import_extension

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType

    from qedfuse.disk.datapath.readtables import ReadTables
    from qedfuse.mount.fuse._extraops import Request
    from qedfuse.mount.fuse.datarequests import DataRequests
    from qedfuse.mount.fuse.requestcounters import SharedCells

    Handler = Callable[[Request, str, int, int, int, int], None]
    """Called with the request, its name (``fallocate`` or ``lseek``) and the inode; then the mode
    or the whence, the guest offset, and the length in bytes (without meaning for lseek)."""

    MaySeek = Callable[[int], bool]
    """Called with the inode of an lseek request; returns whether the extension may answer it from
    the tables.  It may not while the kernel may hold written data that the server
    has not received."""

    SlowAnswer = Callable[[Request, int, int, int], object]
    """Called with the request of a read, its handle, its guest offset and its length in bytes."""


_INTERFACE: Final = 2
"""The interface number of the extension."""


def _load() -> tuple[ModuleType | None, str]:
    """Load the extension, and then put its symbols before those of libfuse, with RTLD_GLOBAL.

    An extension that cannot be used must not interpose anything.  So its symbols become global only
    after its interface number was compared.

    Returns:
        The extension and an empty string, or None and the reason why it is not loaded.
    """
    if "pyfuse3" in sys.modules:
        return None, "pyfuse3 was loaded first"
    try:
        extension = import_extension("qedfuse.mount.fuse._extraops", _INTERFACE)
        ctypes.CDLL(extension.__file__, mode=os.RTLD_NOW | os.RTLD_GLOBAL)
    except ModuleNotFoundError:
        return None, "the extension was not built when qedfuse was installed"
    except (ImportError, OSError) as error:
        return None, str(error)
    return extension, ""


_extension, _load_error = _load()


def serve(
    handler: Handler,
    may_seek: MaySeek | None,
    data_requests: DataRequests | None,
    counters: SharedCells,
) -> str | None:
    """Pass requests of the session to ``handler`` and ``data_requests`` from now on.

    - ``handler`` gets fallocate and lseek.  But if ``may_seek`` permits it, the extension itself
      answers an lseek whose tables are in memory.
    - ``data_requests`` gets the reads, writes and fsyncs that the extension does not answer.
    - pyfuse3 gets the reads, writes and fsyncs that ``data_requests`` does not answer.

    ``counters`` count the reads, writes and fsyncs that the extension or ``data_requests`` answers,
    except the reads that `defer_read` has taken.

    Returns:
        None if the requests are passed.  Otherwise one line with the reason why they are not.
    """
    if _extension is None:
        return _load_error
    if not _extension.hooked():
        return "pyfuse3 has called libfuse without the extension"
    _extension.set_handler(handler, may_seek)
    _extension.stop_blocking()
    _extension.set_counters(*counters)
    if data_requests is not None:
        _extension.set_data_handlers(data_requests.read, data_requests.write, data_requests.fsync)
        share_files(data_requests.tables_for_reads(), counters)
    return None


def share_files(tables: Mapping[int, ReadTables], counters: SharedCells) -> None:
    """Set the files whose reads the extension may answer itself, and the counters of all files.

    ``tables`` are by inode number.  Both arguments replace those of the last call.
    """
    if _extension is not None:
        _extension.set_counters(*counters)
        views = {inode: _extension.read_view(*found) for inode, found in tables.items()}
        _extension.set_read_views(views, FAST_LOOKUP_MASK % (1 << 64))


def reply_from_file(fd: int, offset: int) -> bool:
    """Answer the read that is being handled; its bytes are at file offset ``offset`` of ``fd``.

    Returns False, and has not answered, if the page cache lacks some of the bytes, the length is
    not suited for splice(2) (``_extraops.h``), or the kernel or libfuse cannot pass the bytes on.

    Raises:
        RuntimeError: The extension is not loaded, or no unanswered read is being handled.
    """
    return _loaded().reply_from_file(fd, offset)  # type: ignore[no-any-return]


def defer_read() -> Request:
    """Keep the read that is being handled from pyfuse3; return an object that can answer it later.

    Raises:
        RuntimeError: As in `reply_from_file`.
    """
    return _loaded().defer_read()  # type: ignore[no-any-return]


def _loaded() -> ModuleType:
    """Return the extension, or raise RuntimeError."""
    if _extension is None:
        msg = "the extension is not loaded"
        raise RuntimeError(msg)
    return _extension


def open_read_queue(answer_slowly: SlowAnswer, slow_seconds: float) -> int:
    """Let reads whose data is not in memory wait in a queue of the kernel from now on.

    The caller must close the queue before the session ends (`close_read_queue`).

    Args:
        answer_slowly: Answers a read that has failed in the queue.
        slow_seconds: If passing reads to the kernel takes longer than this, because the kernel
            waits, no read is queued during the next second.

    Returns:
        A descriptor.  It becomes readable when a read has ended, and stays so until the call of
        `end_queued_reads`.

    Raises:
        OSError: The kernel has no such queue, or refuses it.
        RuntimeError: The extension is not loaded.
    """
    return _loaded().open_read_queue(answer_slowly, slow_seconds)  # type: ignore[no-any-return]


def close_read_queue() -> None:
    """Remove the queue of `open_read_queue`.

    Raises:
        RuntimeError: A read is in the queue, or the extension is not loaded.
    """
    _loaded().close_read_queue()


def permit_polling(
    each_seconds: float, all_seconds: float, has_finished: Callable[[], bool]
) -> None:
    """Let the extension poll for the next request after it has answered one (`_burst.c`).

    Args:
        each_seconds: Maximum time to poll for one request.
        all_seconds: Time from now after which the extension no longer polls; this function must be
            called again before it does.
        has_finished: Returns whether a call on a host file has finished, which also ends polling.
    """
    if _extension is not None:
        _extension.permit_polling(each_seconds, all_seconds, has_finished)


def _zero() -> int:
    """Return 0, where the extension is missing."""
    return 0


def _do_nothing() -> None:
    """Do nothing, where the extension is missing."""


take_burst_count: Final[Callable[[], int]] = (
    _zero if _extension is None else _extension.take_burst_count
)
"""Returns how many requests the extension itself has read from the kernel since the last call."""

forbid_polling: Final[Callable[[], None]] = (
    _do_nothing if _extension is None else _extension.forbid_polling
)
"""Ends what `permit_polling` permits."""

take_polled_seconds: Final[Callable[[], float]] = (
    _zero if _extension is None else _extension.take_polled_seconds
)
"""Returns how many seconds the last poll took if no request has come since; otherwise 0.  A second
call returns 0 as well."""

queued_reads: Final[Callable[[], int]] = _zero if _extension is None else _extension.queued_reads
"""Returns how many reads are in the queue of the kernel (`_queuedread.c`)."""

end_queued_reads: Final[Callable[[], None]] = (
    _do_nothing if _extension is None else _extension.end_queued_reads
)
"""Answers the queued reads that have ended."""


def end() -> None:
    """Detach from the session; requests that were not answered get no answer any more.

    The caller must call this before it closes the session, which frees the requests.
    """
    if _extension is not None:
        _extension.set_handler(None)
        _extension.set_data_handlers(None, None, None)
        _extension.set_read_views({}, 0)
        _extension.set_counters(0, ())
        _extension.end()
