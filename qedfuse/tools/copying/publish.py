"""Copying an image to an object store, from which any number of machines can read the image."""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.disk.options import OpenOptions
from qedfuse.errors import HostError, ImageInUseError, RemoteError, UsageError
from qedfuse.hostio.lockedfile import open_locked
from qedfuse.hostio.locking import LockMode
from qedfuse.hostio.regular import status_of
from qedfuse.hostio.systemcalls import read_all
from qedfuse.remote.address import STORES, is_url, parse_address
from qedfuse.remote.object import make_client
from qedfuse.remote.opening import client_options
from qedfuse.text import printable
from qedfuse.tools.copying.convert import convert
from qedfuse.tools.inspection.imagereader import DescriptorReader
from qedfuse.tools.inspection.info import describe_open
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qedfuse.remote.address import Address
    from qedfuse.remote.upload import Upload, Uploaded
    from qedfuse.util.backgroundtasks import Progress

_log = logging.getLogger(__name__)

_STOP_SECONDS: Final = 15.0
"""Maximum time that a cancelled task waits for the removal of what it has stored."""
_FLATTENED_NAME: Final = "flattened.qed"
_TEMPORARY_DIRECTORY: Final = "/var/tmp"  # noqa: S108  for large files; TMPDIR names another one


@dataclass(frozen=True, slots=True)
class Published:
    """The result of `publish`.

    Attributes:
        url: The URL of the object.
        size: Length of the object in bytes.
        version: The version of the object; empty if the store reported none.
        is_raw: Whether the object is a raw file and not an image.
    """

    url: str
    size: int
    version: str
    is_raw: bool


async def publish(
    path: str,
    url: str,
    *,
    flatten: bool = False,
    overwrite: bool = False,
    options: OpenOptions | None = None,
    progress: Progress | None = None,
) -> Published:
    """Copy an image or a raw file to an object store as one object.

    The file is locked for reading while it is read, unless ``options.lock`` is False.  The object
    appears when it is complete, and is then compared with the file.  Even without ``overwrite`` it
    replaces an object of this name that another program stores while the last parts are sent.

    A failed or cancelled call leaves no object, except in these cases:

    - The store stops answering, refuses the comparison or the removal, or has given the object no
      entity tag by which it could be removed.  The error says what may remain.
    - The removal after a cancellation takes more than `_STOP_SECONDS` or is not confirmed.  A
      warning is logged.
    - The call is cancelled after the comparison; with ``overwrite`` also during it, because the
      replaced object cannot be restored.  A warning is logged.

    Args:
        path: The image or raw file; with ``flatten`` also a URL.
        url: The URL of the object.
        flatten: Whether to publish one new image with the content of the whole chain.
        overwrite: Whether to replace an object that exists.
        options: How to open the image, and how to connect; None for the defaults.
        progress: Called with the number of bytes that are done, and the total.  Flattening, the
            upload and the comparison each begin again at 0.

    Raises:
        UsageError: ``url`` is not that of an object in a store, or the object exists and
            ``overwrite`` is False.  Or, without ``flatten``, ``path`` is a URL, has a backing file
            or was not closed cleanly.
        RemoteError: The store cannot be reached, refuses the object or has stored other content, or
            the library for stores is not installed.
        QedError: The image cannot be opened, locked or read, or has changed during the call.  Or
            the temporary image of ``flatten`` cannot be written.
    """
    options = options or OpenOptions()
    address = _address_in_store(url)
    if is_url(path) and not flatten:
        msg = f"{parse_address(path).shown}: found a URL, expected a file (or --flatten)"
        raise UsageError(msg)
    connection = client_options(options.remote)
    # Reports a missing library or invalid credentials before any other work.
    make_client(address, connection)
    from qedfuse.remote.upload import Upload  # noqa: PLC0415  needs the library
    from qedfuse.remote.uploadwatch import watch_store  # noqa: PLC0415  only if needed

    deadlines = options.remote.deadlines
    with ExitStack() as stack:
        source = path
        if flatten:
            directory = os.environ.get("TMPDIR") or _TEMPORARY_DIRECTORY
            try:
                directory = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="qedimg-", dir=directory)
                )
            except OSError as error:
                raise HostError.from_os(error, printable(directory), "make a directory") from error
            source = os.path.join(directory, _FLATTENED_NAME)  # noqa: PTH118  str paths
            await convert(path, source, durable=False, options=options, progress=progress)
        lock = LockMode.to_read(share=options.force_share) if options.lock else None
        fd = open_locked(source, lock)
        stack.callback(os.close, fd)
        file = _PublishedFile(fd, source)
        is_raw = not flatten and not _require_publishable(file)
        upload = Upload(
            *(address, file, file.size, connection),
            overwrite=overwrite,
            progress=progress,
            retry_seconds=deadlines.total_seconds,
        )
        watch = partial(watch_store, address, connection, deadlines, lambda: upload.steps)
        uploaded = await _run(upload, watch, stack, address.shown)
        return Published(address.url, uploaded.size, uploaded.version, is_raw)


class _PublishedFile:
    """The file that is published, which must not change during the upload."""

    def __init__(self, fd: int, path: str) -> None:
        """Take an open file; remember its length and time of modification."""
        self.fd = fd
        self.path = path
        self.name = printable(path)
        self._status = status_of(fd, self.name)
        self.size = self._status.st_size

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from an offset; return how many bytes were read."""
        try:
            count = read_all(self.fd, offset, view)
        except OSError as error:
            raise HostError.from_os(error, self.name, "read") from error
        now = status_of(self.fd, self.name)
        before = self._status
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            msg = f"{self.name}: found the file changed during the upload, expected it unchanged"
            raise ImageInUseError(msg)
        return count


def _address_in_store(url: str) -> Address:
    """Return the address for the URL of an object in a store; refuse any other target."""
    expected = "one of " + ", ".join(f"{scheme}://BUCKET/KEY" for scheme in STORES)
    if not is_url(url):
        msg = f"{printable(url)}: target: found a path, expected {expected}"
        raise UsageError(msg)
    address = parse_address(url)
    if address.scheme not in STORES:
        found = "a web server" if address.is_web else "an NBD server"
        msg = f"{address.shown}: target: found {found}, expected {expected}"
        raise UsageError(msg)
    if address.version:
        msg = f"{address.shown}: target: found a version, expected none"
        raise UsageError(msg)
    return address


def _require_publishable(file: _PublishedFile) -> bool:
    """Refuse an image that other machines could not use; return whether the file is an image."""
    try:
        qed = describe_open(DescriptorReader(file.fd), file.path).qed
    except OSError as error:
        raise HostError.from_os(error, file.name, "read") from error
    if qed is None:
        return False
    if qed.need_check:
        msg = (
            f"{file.name}: found NEED_CHECK set, expected an image that was closed cleanly "
            f"(qedimg check -r all {shlex.quote(file.name)})"
        )
        raise UsageError(msg)
    if qed.names_backing:
        msg = (
            f"{file.name}: found a backing file, expected none (--flatten publishes the chain as "
            "one image)"
        )
        raise UsageError(msg)
    if qed.header.problems:
        raise qed.header.problems[0]
    return True


async def _run(
    upload: Upload, watch: Callable[[], Awaitable[object]], stack: ExitStack, shown: str
) -> Uploaded:
    """Run an upload in a thread; return its result.

    A cancelled upload removes what it has stored.  This function waits for that, for at most
    `_STOP_SECONDS`, and logs the wait because the user waits too.  Another line is logged if
    anything may remain.  If the thread has not ended by then, the files of ``stack`` stay open.

    ``watch`` runs meanwhile.  It raises RemoteError if the store does not answer any more.  Then
    this function raises the error without waiting for the thread.
    """
    from qedfuse.remote.storedobject import MAY_REMAIN  # noqa: PLC0415  needs the library
    from qedfuse.remote.uploadcheck import StoppedError  # noqa: PLC0415  as above

    token = trio.lowlevel.current_trio_token()
    ended = trio.Event()
    outcome: Uploaded | Exception | None = None
    outages: list[RemoteError] = []
    is_cancelled = True  # until the nursery has ended without a cancellation from outside

    def work() -> Uploaded | None:
        try:
            return upload.run()
        except StoppedError:
            return None
        finally:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(ended.set)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_in_outage, watch, outages, nursery.cancel_scope)
            try:
                outcome = await run_in_thread(work, abandon_on_cancel=True)
            except trio.Cancelled:
                upload.stop()
                if not outages and upload.has_begun:
                    _log.warning("%s: stopping the upload, for at most %g s", shown, _STOP_SECONDS)
                    with trio.move_on_after(_STOP_SECONDS, shield=True):
                        await ended.wait()
                if upload.has_begun and not ended.is_set():
                    _keep_open(stack)
                raise
            except Exception as error:  # noqa: BLE001  raised below, where no nursery wraps it
                outcome = error
            nursery.cancel_scope.cancel()
        is_cancelled = False
    finally:
        # Logged here, because the handler above misses a cancellation after the thread's end.
        if is_cancelled and upload.has_begun:
            _log_remains(upload, shown, has_ended=ended.is_set())
    if outcome is None:
        # Only `_cancel_in_outage` leads here: the nursery has absorbed its cancellation.  Any other
        # cancellation leaves this function with an exception.
        msg = f"{outages[0]}{MAY_REMAIN if upload.has_begun else ''}"
        raise RemoteError(msg) from outages[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


async def _cancel_in_outage(
    watch: Callable[[], Awaitable[object]], outages: list[RemoteError], scope: trio.CancelScope
) -> None:
    """Await ``watch()``; after a RemoteError add it to ``outages`` and cancel ``scope``."""
    try:
        await watch()
    except RemoteError as error:
        outages.append(error)
        scope.cancel()


def _log_remains(upload: Upload, shown: str, *, has_ended: bool) -> None:
    """Log what a cancelled upload has left in the store, if anything; ``shown`` is the URL."""
    from qedfuse.remote.storedobject import MAY_REMAIN, Remains  # noqa: PLC0415  needs the library

    if not has_ended:
        _log.warning("%s: the upload has not ended%s", shown, MAY_REMAIN)
    elif upload.remains is Remains.OBJECT:
        _log.warning("%s: the upload was complete, so the object stays in the store", shown)
    elif upload.remains is Remains.UNKNOWN:
        _log.warning("%s: the removal was not confirmed%s", shown, MAY_REMAIN)


def _keep_open(stack: ExitStack) -> None:
    """Keep the files of ``stack`` open until the process ends; a thread may still read them."""
    stack.pop_all()
