"""The content of an upload, read in parts."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Final, Protocol

from qedfuse.errors import HostError, RemoteError
from qedfuse.remote.uploadcheck import StoppedError
from qedfuse.util.threads import start_thread

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

_MIN_PART_BYTES: Final = 8 << 20
_LONG_PART_BYTES: Final = 64 << 20
"""Maximum length of a part, unless the content would then have more than `_MAX_PARTS` parts."""
_MAX_PARTS_EVERYWHERE: Final = 1_000
"""Maximum number of parts that every store accepts; most stores accept `_MAX_PARTS`."""
_MAX_PARTS: Final = 10_000
_DRAIN_SECONDS: Final = 3.0
"""How long a failed upload waits for the parts that are being sent, before it is aborted."""


class Content(Protocol):
    """The content of an upload."""

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from an offset; return how many bytes were read.

        Raises:
            QedError: The content cannot be read, or has changed.
        """


class ContentParts:
    """Reads the content of an upload in parts, and records the checksums of the parts.

    Attributes:
        part_bytes: Length in bytes of the parts, except the last.
        digests: The MD5 checksum of each part that `read` has read.
    """

    def __init__(
        self,
        content: Content,
        size: int,
        shown: str,
        *,
        before_end: Callable[[], object],
        progress: Callable[[int, int], object],
        stopped: threading.Event,
    ) -> None:
        """Prepare to read ``size`` bytes of ``content``.

        Args:
            content: The content.
            size: Length of the content in bytes.
            shown: The URL of the object, for errors.
            before_end: Called in another thread when all parts were read; `read` raises its errors.
            progress: Called after each part with the number of bytes read, and ``size``.
            stopped: Another thread sets the event to end `read`.
        """
        self._content = content
        self._size = size
        self._shown = shown
        self._before_end = before_end
        self._progress = progress
        self._stopped = stopped
        self.part_bytes = part_bytes(size)
        self.digests: list[bytes] = []
        self._is_read_to_end = False

    @property
    def is_single(self) -> bool:
        """Whether one part has the whole content."""
        return self._size <= self.part_bytes

    @property
    def is_read_to_end(self) -> bool:
        """Whether the store may have made the object, because all parts were read."""
        return self._is_read_to_end

    def restart(self) -> None:
        """Forget the checksums, because the upload begins again with the first part."""
        self.digests.clear()
        self._is_read_to_end = False

    def read_single(self) -> bytearray:
        """Return the content, which must fit into one part.

        Neither ``before_end`` nor ``progress`` is called.
        """
        block = next(self.read(), bytearray())
        self._is_read_to_end = True
        return block

    def read(self) -> Iterator[bytearray]:
        """Yield the content in parts, as `_read_parts` does; wait before passing on an exception.

        After an exception, obstore removes the parts that the store has.  Without the wait, a part
        that was being sent could arrive after the removal, and stay in the store.
        """
        try:
            yield from self._read_parts()
        except Exception:
            if self.digests:
                self._drain()
            raise

    def _drain(self) -> None:
        """Give the parts that are being sent some time to arrive; meanwhile no part is begun."""
        time.sleep(_DRAIN_SECONDS)

    def _read_parts(self) -> Iterator[bytearray]:
        """Yield the content in parts; record the checksum of each part.

        When this function ends, the store makes the object.  So ``before_end`` is called here.
        """
        for start in range(0, self._size, self.part_bytes):
            if self._stopped.is_set():
                raise StoppedError
            block = bytearray(min(self.part_bytes, self._size - start))
            count = self._content.read_blocking(start, memoryview(block))
            if count < len(block):
                msg = f"found {start + count} bytes, expected {self._size}: the file was truncated"
                raise RemoteError(msg)
            self.digests.append(hashlib.md5(block, usedforsecurity=False).digest())
            yield block
            self._progress(start + len(block), self._size)
        if self._stopped.is_set():
            raise StoppedError
        _in_thread(self._before_end, self._shown)
        self._is_read_to_end = True


def _in_thread(call: Callable[[], object], name: str) -> None:
    """Call a function in a new thread, and wait for it; ``name`` is the object's name in errors.

    The thread from which obstore takes the parts cannot itself call functions of obstore.
    """
    failures: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001  raised below
            failures.append(error)

    # A daemon, because the process may end while the store does not answer.
    try:
        thread = start_thread(work, name="qedfuse-upload")
    except OSError as error:
        raise HostError.from_os(error, name, "start a thread") from error
    thread.join()
    for failure in failures:
        raise failure


def part_bytes(size: int) -> int:
    """Return the length in bytes of the parts, except the last, for content of ``size`` bytes."""
    for_all_stores = min(-(-size // _MAX_PARTS_EVERYWHERE), _LONG_PART_BYTES)
    part = max(_MIN_PART_BYTES, for_all_stores, -(-size // _MAX_PARTS))
    return -(-part // _MIN_PART_BYTES) * _MIN_PART_BYTES
