"""Host files that replace `PosixFile` in tests: in memory, recording, failing, held up.

`MemoryFile` holds the bytes of an image.  `RecordingFile` also keeps every change in order,
so that a test can rebuild the file after any change, or as a power failure could have left
it.  `FailingFile` wraps another file; chosen calls fail, write less, or are held up.

A fault that never strikes tests nothing.  Therefore every fault and every held call is
registered here, and a fixture for all tests (`tests/conftest.py`) fails a test whose fault did
not strike, or whose held call was not reached.
"""

from __future__ import annotations

import errno as errnos
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Self, TypeAlias

import trio

from qedfuse.errors import HostError

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from qedfuse.hostio.hostfile import Buffer, FileIdentity, HostFile
    from qedfuse.hostio.pagesource import PageSource, WriteTarget
    from qedfuse.hostio.readpolicy import ReadPolicy

SECTOR: Final = 512
"""The unit in bytes that a disk writes atomically."""

BLOCK_BYTES: Final = 4096
"""The unit in bytes in which `MemoryFile` distinguishes data from holes."""

Action: TypeAlias = Literal["read", "write", "datasync", "truncate", "punch", "reserve"]


class Write(NamedTuple):
    """Bytes written at an offset."""

    offset: int
    data: bytes


class Truncate(NamedTuple):
    """The length of the file set to ``size`` bytes."""

    size: int


class Punch(NamedTuple):
    """A range deallocated on the host; it reads as zeros."""

    offset: int
    length: int


class Sync(NamedTuple):
    """A datasync, which makes durable the changes that were complete when it began."""

    missed: int = 0
    """How many of the preceding changes were made during the datasync, so are not covered."""


Change: TypeAlias = Write | Truncate | Punch | Sync


def apply(content: bytearray, change: Change) -> None:
    """Apply one change to the bytes of a file, in place."""
    if isinstance(change, Write):
        end = change.offset + len(change.data)
        if end > len(content):
            content.extend(bytes(end - len(content)))
        content[change.offset : end] = change.data
    elif isinstance(change, Punch):
        end = min(change.offset + change.length, len(content))
        content[change.offset : end] = bytes(max(0, end - change.offset))
    elif isinstance(change, Truncate):
        if change.size <= len(content):
            del content[change.size :]
        else:
            content.extend(bytes(change.size - len(content)))


class MemoryFile:
    """A host file in memory.

    Every call yields to other tasks once before it takes effect, and can be cancelled there.
    A real file yields less often, so tests on this one see more interleavings.

    Attributes:
        in_page_cache: Whether the ``try_`` calls succeed, as they do on a real file whose bytes
            are in the page cache.
        counts: How many calls of each kind there were; ``try_`` calls are not counted.
    """

    def __init__(
        self, content: bytes | bytearray = b"", *, name: str = "image", writable: bool = True
    ) -> None:
        """Start with a copy of ``content``."""
        self.content = bytearray(content)
        self.path = self.name = name
        self.writable = writable
        self.can_punch = True
        self.read_policy: ReadPolicy | None = None
        self.page_source: PageSource | None = None
        self.write_target: WriteTarget | None = None
        self.in_page_cache = False
        self.closed = False
        self.counts: Counter[Action] = Counter()

    async def _enter(self, action: Action) -> None:
        """Start a call: count it, and let other tasks run."""
        assert not self.closed, f"{action} after close"
        self.counts[action] += 1
        await trio.lowlevel.checkpoint()

    async def _leave(self) -> None:
        """End a call whose effect is in the file."""

    def fileno(self) -> int:
        """Return -1: there is no descriptor."""
        return -1

    @property
    def identity(self) -> FileIdentity:
        """A tuple with only the object, which equals no other."""
        return (self,)

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Fill ``view``; return how many bytes the file had, which is less only at its end."""
        data = self.content[offset : offset + len(view)]
        view[: len(data)] = data
        return len(data)

    async def pread(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes, or fewer if the file ends before."""
        await self._enter("read")
        data = bytes(self.content[offset : offset + length])
        await self._leave()
        return data

    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view``; return how many bytes the file had, which is less only at its end."""
        data = await self.pread(offset, len(view))
        view[: len(data)] = data
        return len(data)

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill ``view``; False, without a change, if not cached or past the end of the file."""
        data = self.content[offset : offset + len(view)]
        if not self.in_page_cache or len(data) < len(view):
            return False
        view[:] = data
        return True

    def try_start_read(self, *_: object) -> bool:
        """Return False: there are no threads here."""
        return False

    def can_write_inline(self, _length: int) -> bool:
        """Return whether a write would be made without a thread."""
        return self.in_page_cache

    def try_grow(self, size: int) -> bool:
        """Grow the file to ``size`` bytes; False, without a change, if it is not cached."""
        assert size > len(self.content), "growing makes a file longer"
        if self.in_page_cache:
            self.change(Truncate(size))
        return self.in_page_cache

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write ``data`` at ``offset``; False, without a change, if the file is not cached."""
        assert self.writable, "write to a file that is open read-only"
        if self.in_page_cache:
            self.change(Write(offset, bytes(data)))
        return self.in_page_cache

    async def pwrite(self, offset: int, *parts: Buffer) -> None:
        """Write the parts one after the other at ``offset``, as one write."""
        data = b"".join(parts)
        await self._enter("write")
        assert self.writable, "write to a file that is open read-only"
        self.change(Write(offset, data))
        await self._leave()

    def try_datasync(self) -> bool:
        """Make everything durable; False, without a change, if the file is not cached."""
        if self.in_page_cache:
            self.change(Sync())
        return self.in_page_cache

    async def datasync(self) -> None:
        """Make everything durable that was written before the call."""
        await self._enter("datasync")
        self.change(Sync())
        await self._leave()

    async def truncate(self, size: int) -> None:
        """Set the length of the file in bytes; added bytes read as zeros."""
        await self._enter("truncate")
        assert self.writable, "truncate of a file that is open read-only"
        self.change(Truncate(size))
        await self._leave()

    async def punch(self, *ranges: tuple[int, int]) -> None:
        """Make ranges of (offset, length) read as zeros, one after the other."""
        for offset, length in ranges:
            await self._enter("punch")
            assert self.writable, "punch into a file that is open read-only"
            self.change(Punch(offset, length))
            await self._leave()

    async def reserve(self, offset: int, length: int) -> None:
        """Do nothing: the memory has space for every range inside the file."""
        await self._enter("reserve")
        assert offset + length <= len(self.content), "reserve past the end of the file"

    def change(self, change: Change) -> None:
        """Apply one change, without letting other tasks run."""
        apply(self.content, change)

    async def next_data(self, offset: int) -> int | None:
        """Return where the first data at or past ``offset`` begins; None if there is none.

        A block of `BLOCK_BYTES` that holds only zeros is a hole.
        """
        while offset < len(self.content):
            end = offset - offset % BLOCK_BYTES + BLOCK_BYTES
            if any(self.content[offset:end]):
                return offset
            offset = end
        return None

    async def next_hole(self, offset: int) -> int | None:
        """Return where the first hole at or past ``offset`` begins; the file ends with a hole."""
        while offset < len(self.content):
            end = offset - offset % BLOCK_BYTES + BLOCK_BYTES
            if not any(self.content[offset:end]):
                return offset
            offset = end
        return len(self.content) if offset == len(self.content) else None

    def size(self) -> int:
        """Return the length of the file in bytes."""
        return len(self.content)

    def stored_blocks(self) -> int:
        """Return a fixed number of blocks."""
        return 0

    def stat(self) -> os.stat_result:
        """Return fixed attributes with the file's present length."""
        return os.stat_result((0o100644, 1, 1, 1, 0, 0, len(self.content), 0, 0, 0))

    def statvfs(self) -> os.statvfs_result:
        """Return the attributes of a fixed file system."""
        return os.statvfs_result((4096, 4096, 1, 1, 1, 1, 1, 1, 0, 255))

    async def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Do nothing."""

    def stop_fetching(self) -> None:
        """Return: the file is on no server."""

    def close(self) -> None:
        """Close the file; every later call fails an assertion."""
        self.closed = True

    def reopen(self) -> None:
        """Accept calls again."""
        self.closed = False


class RecordingFile(MemoryFile):
    """A host file in memory that keeps all its changes in order.

    With a ``pace`` some calls take long, before or after their effect, so that more
    combinations of calls overlap.

    Attributes:
        initial: The content at the beginning, which counts as durable.
        changes: All changes and datasyncs since then, the oldest first.
    """

    def __init__(
        self,
        content: bytes | bytearray = b"",
        *,
        name: str = "image",
        writable: bool = True,
        pace: random.Random | None = None,
        linger_probability: float = 0.25,
    ) -> None:
        """Start with ``content``; ``pace`` draws which calls take long, and how long.

        ``linger_probability`` is the chance with which a call takes long before its effect,
        and again after it.
        """
        super().__init__(content, name=name, writable=writable)
        self._linger_probability = linger_probability
        self.initial = bytes(content)
        self.changes: list[Change] = []
        self._pace = pace

    def change(self, change: Change) -> None:
        """Apply a change and record it."""
        super().change(change)
        self.changes.append(change)

    async def datasync(self) -> None:
        """Make everything durable that was in the file when the call began."""
        began = len(self.changes)
        await self._enter("datasync")
        self.change(Sync(len(self.changes) - began))
        await self._leave()

    async def next_data(self, offset: int) -> int | None:
        """Find data, perhaps slowly."""
        await self._linger()
        found = await super().next_data(offset)
        await self._linger()
        return found

    async def _enter(self, action: Action) -> None:
        """Start a call, perhaps slowly."""
        await super()._enter(action)
        await self._linger()

    async def _leave(self) -> None:
        """End a call, perhaps long after its effect."""
        await self._linger()

    async def _linger(self) -> None:
        """Sleep, with the chance `linger_probability` and for a time that ``pace`` draws."""
        if self._pace is not None and self._pace.random() < self._linger_probability:
            await trio.sleep(self._pace.choice((0.0, 0.01, 0.3, 2.0)))

    def prefixes(self) -> Iterator[tuple[int, bytearray]]:
        """Yield each number of changes with the file after them: what a killed process leaves.

        All steps yield the same bytearray; a caller that changes or keeps it makes a copy.
        """
        content = bytearray(self.initial)
        yield 0, content
        for number, change in enumerate(self.changes, 1):
            apply(content, change)
            yield number, content

    def power_loss(self, count: int, choice: random.Random, keep: float = 0.5) -> bytearray:
        """Return one file that a power failure after ``count`` changes could leave.

        Each sector of a write that is not durable, and each change of the length, is kept with
        the chance ``keep``; what is kept is applied in its order.
        `tests.support.crashrecording` covers other orders as well.
        """
        done = self.changes[:count]
        synced = max(
            (n - change.missed for n, change in enumerate(done) if isinstance(change, Sync)),
            default=0,
        )
        content = bytearray(self.initial)
        for change in done[:synced]:
            apply(content, change)
        for change in done[synced:]:
            if isinstance(change, Truncate | Punch):
                if choice.random() < keep:
                    apply(content, change)
            elif isinstance(change, Write):
                for offset, data in _sectors(change):
                    if choice.random() < keep and offset < len(content):
                        apply(content, Write(offset, data[: len(content) - offset]))
        return content


def _sectors(write: Write) -> Iterator[Write]:
    """Split a write at sector boundaries."""
    offset, data = write
    while data:
        length = SECTOR - offset % SECTOR
        yield Write(offset, data[:length])
        offset, data = offset + length, data[length:]


@dataclass(eq=False)
class HeldCall:
    """One call of a `FailingFile` that is held up until `release`.

    Used as a context manager, it releases the call at the end of the block.

    Attributes:
        action: What kind of call it is.
        number: Which call of this kind it is, from 1.
        reached: Set when the call has been made and waits.
    """

    action: Action
    number: int
    reached: trio.Event = field(default_factory=trio.Event)
    _released: trio.Event = field(default_factory=trio.Event)

    @property
    def struck(self) -> bool:
        """Whether the call was made."""
        return self.reached.is_set()

    @property
    def description(self) -> str:
        """Which call it is, for a message."""
        return f"{self.action} number {self.number}, held up"

    def release(self) -> None:
        """Let the call continue."""
        self._released.set()

    def __enter__(self) -> Self:
        """Enter the block in which the call is held up."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the call continue."""
        self.release()

    async def wait(self) -> None:
        """Wait for `release`; the caller cannot be cancelled here, as in a system call."""
        self.reached.set()
        with trio.CancelScope(shield=True):
            await self._released.wait()


@dataclass
class _Fault:
    """A failure: the host's error number, raised after ``short`` bytes of a write.

    Attributes:
        description: Which calls fail, for a message.
        struck: Whether a call has failed with it.
    """

    description: str
    errno: int
    short: int = 0
    struck: bool = False


_armed: Final[list[_Fault | HeldCall]] = []
"""All faults and held calls that must strike before the test ends."""


def take_unstruck() -> list[str]:
    """Return what was armed since the last call and never struck, and forget all of it."""
    unstruck = [fault.description for fault in _armed if not fault.struck]
    _armed.clear()
    return unstruck


class FailingFile:
    """A host file whose chosen calls fail or are held up; all others go to ``inner``.

    Attributes:
        inner: The file behind this one.
        calls: How many calls of each kind there were; ``try_`` calls are not counted.
        struck: How many calls of each kind have failed.
    """

    def __init__(self, inner: HostFile) -> None:
        """Wrap ``inner``, without any fault yet."""
        self.inner = inner
        self.path = inner.path
        self.name = inner.name
        self.writable = inner.writable
        self.can_punch = inner.can_punch
        self.read_policy: ReadPolicy | None = None
        self.page_source: PageSource | None = None
        self.write_target: WriteTarget | None = None
        self.calls: Counter[Action] = Counter()
        self.struck: Counter[Action] = Counter()
        self._faults: dict[tuple[Action, int], _Fault] = {}
        self._always: dict[Action, tuple[int, _Fault]] = {}
        self._held_calls: dict[tuple[Action, int], HeldCall] = {}
        self._below: dict[Action, int] = {}

    def fail(
        self,
        action: Action,
        nth: int | None = 1,
        number: int = errnos.EIO,
        *,
        short: int = 0,
        lasting: bool = False,
        may_miss: bool = False,
    ) -> None:
        """Make the ``nth`` call from now on fail, or all of them if ``nth`` is None.

        A write that fails has written its first ``short`` bytes.  A ``lasting`` fault
        makes all later calls fail as well, until `heal`.  The test fails if no call meets the
        fault, unless it ``may_miss``: then the test itself looks at `struck`.
        """
        which = "any" if nth is None else f"number {self.calls[action] + nth}"
        fault = _Fault(f"{action} ({which}) with errno {number}", number, short)
        if not may_miss:
            _armed.append(fault)
        if nth is None or lasting:
            self._always[action] = (self.calls[action] + (nth or 1), fault)
        else:
            self._faults[action, self.calls[action] + nth] = fault

    def limit(self, action: Action, below: int) -> None:
        """Let the faults of an action strike only calls at file offsets below ``below``."""
        self._below[action] = below

    def heal(self) -> None:
        """Remove all faults: no call fails any more."""
        self._faults.clear()
        self._always.clear()
        self._below.clear()

    def hold(self, action: Action, nth: int = 1, *, may_miss: bool = False) -> HeldCall:
        """Hold up the ``nth`` call from now on.

        The test fails if the call is never made, unless it ``may_miss``.
        """
        number = self.calls[action] + nth
        held = self._held_calls[action, number] = HeldCall(action, number)
        if not may_miss:
            _armed.append(held)
        return held

    async def _enter(self, action: Action, offset: int = 0) -> _Fault | None:
        """Count a call, and hold it up if asked to; return its fault, None if it succeeds."""
        self.calls[action] += 1
        key = (action, self.calls[action])
        if held := self._held_calls.pop(key, None):
            await held.wait()
        fault = self._faults.pop(key, None)
        since, always = self._always.get(action, (0, None))
        if self.calls[action] >= since:
            fault = fault or always
        return fault if offset < self._below.get(action, offset + 1) else None

    def _raise(self, fault: _Fault, action: Action) -> None:
        """Count a failure and raise it."""
        fault.struck = True
        self.struck[action] += 1
        error = OSError(fault.errno, os.strerror(fault.errno))
        raise HostError.from_os(error, self.name, action)

    def fileno(self) -> int:
        """Return -1, so that every read is a call."""
        return -1

    @property
    def identity(self) -> FileIdentity:
        """The identity of the inner file."""
        return self.inner.identity

    def read_blocking(self, offset: int, view: memoryview) -> int:
        """Read without any fault: faults are for the calls of the event loop."""
        return self.inner.read_blocking(offset, view)

    async def pread(self, offset: int, length: int) -> bytes | bytearray:
        """Read, or fail."""
        if fault := await self._enter("read", offset):
            self._raise(fault, "read")
        return await self.inner.pread(offset, length)

    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Read, or fail."""
        if fault := await self._enter("read", offset):
            self._raise(fault, "read")
        return await self.inner.pread_into(offset, view)

    def try_read(self, *_: object) -> bool:
        """Return False, so that the caller reads by `pread`, which can fail and be held up."""
        return False

    def try_start_read(self, *_: object) -> bool:
        """Return False, so that the caller reads by `pread`, which can fail and be held up."""
        return False

    def try_grow(self, *_: object) -> bool:
        """Return False, so that the caller grows the file by `truncate`."""
        return False

    def can_write_inline(self, _length: int) -> bool:
        """Return False: no write is made without a thread here."""
        return False

    def try_write(self, *_: object) -> bool:
        """Return False, so that the caller writes by `pwrite`."""
        return False

    async def pwrite(self, offset: int, *parts: Buffer) -> None:
        """Write, or write less and fail."""
        if fault := await self._enter("write", offset):
            if fault.short:
                await self.inner.pwrite(offset, b"".join(parts)[: fault.short])
            self._raise(fault, "write")
        await self.inner.pwrite(offset, *parts)

    def try_datasync(self) -> bool:
        """Return False, so that the caller calls `datasync`, which can fail and be held up."""
        return False

    async def datasync(self) -> None:
        """Make the content durable, or fail."""
        if fault := await self._enter("datasync"):
            self._raise(fault, "datasync")
        await self.inner.datasync()

    async def truncate(self, size: int) -> None:
        """Set the length, or fail."""
        if fault := await self._enter("truncate"):
            self._raise(fault, "truncate")
        await self.inner.truncate(size)

    async def punch(self, *ranges: tuple[int, int]) -> None:
        """Punch ranges one after the other, or fail at one of them."""
        for offset, length in ranges:
            if fault := await self._enter("punch", offset):
                self._raise(fault, "punch")
            await self.inner.punch((offset, length))

    async def reserve(self, offset: int, length: int) -> None:
        """Reserve space, or fail."""
        if fault := await self._enter("reserve", offset):
            self._raise(fault, "reserve")
        await self.inner.reserve(offset, length)

    async def next_data(self, offset: int) -> int | None:
        """Find data as ``inner`` does."""
        return await self.inner.next_data(offset)

    async def next_hole(self, offset: int) -> int | None:
        """Find a hole as ``inner`` does."""
        return await self.inner.next_hole(offset)

    def size(self) -> int:
        """Return the length of ``inner``."""
        return self.inner.size()

    def stored_blocks(self) -> int:
        """Return the blocks of ``inner``."""
        return self.inner.stored_blocks()

    def stat(self) -> os.stat_result:
        """Return the attributes of ``inner``."""
        return self.inner.stat()

    def statvfs(self) -> os.statvfs_result:
        """Return the attributes of the file system of ``inner``."""
        return self.inner.statvfs()

    async def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set the times of ``inner``."""
        await self.inner.set_times(atime_ns, mtime_ns)

    def stop_fetching(self) -> None:
        """Return: the file is on no server."""

    def close(self) -> None:
        """Close ``inner``."""
        self.inner.close()
