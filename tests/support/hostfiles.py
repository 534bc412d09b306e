"""Host files that stand in for `PosixFile`: in memory, recording, failing, holding.

`RecordingFile` keeps every change in order, so that a test can look at the file as it
was after any of them, or as a power failure could have left it.  `FailingFile` wraps
another file and refuses, shortens or holds up a chosen call.
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

    from qedfuse.hostio.hostfile import Buffer, HostFile

SECTOR: Final = 512
"""What a disk writes whole or not at all, in bytes."""

BLOCK_BYTES: Final = 4096
"""The grain in which `MemoryFile` tells data from holes, in bytes."""

Action: TypeAlias = Literal["read", "write", "datasync", "truncate", "punch", "reserve"]


class Write(NamedTuple):
    """Bytes written at an offset."""

    offset: int
    data: bytes


class Truncate(NamedTuple):
    """The file's length set, in bytes."""

    size: int


class Punch(NamedTuple):
    """A range given back to the host."""

    offset: int
    length: int


class Sync(NamedTuple):
    """The changes before it made durable that were complete when it began."""

    missed: int = 0
    """How many of the latest changes were made while it was under way."""


Change: TypeAlias = Write | Truncate | Punch | Sync


def apply(content: bytearray, change: Change) -> None:
    """Make one change to the bytes of a file."""
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

    Every call yields to other tasks once before it acts, and can be cancelled there,
    which is more than a real file does: what is right here does not depend on luck.

    Attributes:
        at_hand: Whether reads and short writes can be had without waiting.
    """

    def __init__(
        self, content: bytes | bytearray = b"", *, name: str = "image", writable: bool = True
    ) -> None:
        """Hold a copy of ``content``."""
        self.content = bytearray(content)
        self.name = name
        self.writable = writable
        self.can_punch = True
        self.in_page_cache = False
        self.closed = False
        self.counts: Counter[Action] = Counter()

    async def _enter(self, action: Action) -> None:
        """Begin a call: count it, and let others run."""
        assert not self.closed, f"{action} after close"
        self.counts[action] += 1
        await trio.lowlevel.checkpoint()

    async def _leave(self) -> None:
        """End a call that has had its effect."""

    async def pread(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes; fewer only where the file ends."""
        await self._enter("read")
        data = bytes(self.content[offset : offset + length])
        await self._leave()
        return data

    async def pread_into(self, offset: int, view: memoryview) -> int:
        """Fill ``view``; return how many bytes there were before the file ended."""
        data = await self.pread(offset, len(view))
        view[: len(data)] = data
        return len(data)

    def try_read(self, offset: int, view: memoryview) -> bool:
        """Fill ``view``, if that can be done at once and the file has that much."""
        data = self.content[offset : offset + len(view)]
        if not self.in_page_cache or len(data) < len(view):
            return False
        view[:] = data
        return True

    def can_write_inline(self, _length: int) -> bool:
        """Tell whether writes are done at once."""
        return self.in_page_cache

    def try_grow(self, size: int) -> bool:
        """Grow, if that can be done at once."""
        assert size > len(self.content), "growing makes a file longer"
        if self.in_page_cache:
            self.change(Truncate(size))
        return self.in_page_cache

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Write, if that can be done at once."""
        assert self.writable, "write to a file that is open read-only"
        if self.in_page_cache:
            self.change(Write(offset, bytes(data)))
        return self.in_page_cache

    async def pwrite(self, offset: int, *parts: Buffer) -> None:
        """Write the parts one behind the other, as one write."""
        data = b"".join(parts)
        await self._enter("write")
        assert self.writable, "write to a file that is open read-only"
        self.change(Write(offset, data))
        await self._leave()

    async def datasync(self) -> None:
        """Note that everything so far is durable."""
        await self._enter("datasync")
        self.change(Sync())
        await self._leave()

    async def truncate(self, size: int) -> None:
        """Set the file's length; what is added reads as zeros."""
        await self._enter("truncate")
        assert self.writable, "truncate of a file that is open read-only"
        self.change(Truncate(size))
        await self._leave()

    async def punch(self, *ranges: tuple[int, int]) -> None:
        """Make ranges read as zeros, one after the other."""
        for offset, length in ranges:
            await self._enter("punch")
            assert self.writable, "punch into a file that is open read-only"
            self.change(Punch(offset, length))
            await self._leave()

    async def reserve(self, offset: int, length: int) -> None:
        """Do nothing: there is room."""
        await self._enter("reserve")
        assert offset + length <= len(self.content), "reserve past the end of the file"

    def change(self, change: Change) -> None:
        """Make a change at once."""
        apply(self.content, change)

    async def next_data(self, offset: int) -> int | None:
        """Find where the first data at or past ``offset`` begins, by blocks of `HOLE`."""
        while offset < len(self.content):
            end = offset - offset % BLOCK_BYTES + BLOCK_BYTES
            if any(self.content[offset:end]):
                return offset
            offset = end
        return None

    async def next_hole(self, offset: int) -> int | None:
        """Find where the first hole at or past ``offset`` begins, by blocks of `HOLE`."""
        while offset < len(self.content):
            end = offset - offset % BLOCK_BYTES + BLOCK_BYTES
            if not any(self.content[offset:end]):
                return offset
            offset = end
        return len(self.content) if offset == len(self.content) else None

    def size(self) -> int:
        """Give the file's length now."""
        return len(self.content)

    def stat(self) -> os.stat_result:
        """Give made-up attributes with the length of now."""
        return os.stat_result((0o100644, 1, 1, 1, 0, 0, len(self.content), 0, 0, 0))

    def statvfs(self) -> os.statvfs_result:
        """Describe a file system that is made up, too."""
        return os.statvfs_result((4096, 4096, 1, 1, 1, 1, 1, 1, 0, 255))

    async def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Forget the times."""

    def close(self) -> None:
        """Refuse all calls from now on."""
        self.closed = True

    def reopen(self) -> None:
        """Accept calls again."""
        self.closed = False


class RecordingFile(MemoryFile):
    """A host file that keeps every change that is made to it, in order.

    With a ``pace`` some calls take long, before they have their effect or after, so that
    what is under way at once differs from what luck would have it.
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
        """Start with ``content``, which counts as durable.

        ``linger_probability`` is the share of calls that take long.
        """
        super().__init__(content, name=name, writable=writable)
        self._linger_probability = linger_probability
        self.initial = bytes(content)
        self.changes: list[Change] = []
        self._pace = pace

    def change(self, change: Change) -> None:
        """Make a change and note it."""
        super().change(change)
        self.changes.append(change)

    async def datasync(self) -> None:
        """Note that what was there when the call began is durable."""
        began = len(self.changes)
        await self._enter("datasync")
        self.change(Sync(len(self.changes) - began))
        await self._leave()

    async def next_data(self, offset: int) -> int | None:
        """Look for data, and perhaps take long over it."""
        await self._linger()
        found = await super().next_data(offset)
        await self._linger()
        return found

    async def _enter(self, action: Action) -> None:
        """Begin a call, and perhaps take long over it."""
        await super()._enter(action)
        await self._linger()

    async def _leave(self) -> None:
        """End a call, perhaps long after it has had its effect."""
        await self._linger()

    async def _linger(self) -> None:
        """Take some time, now and then."""
        if self._pace is not None and self._pace.random() < self._linger_probability:
            await trio.sleep(self._pace.choice((0.0, 0.01, 0.3, 2.0)))

    def prefixes(self) -> Iterator[tuple[int, bytearray]]:
        """Show the file after each number of changes: what a killed process leaves.

        The bytes are shared between the steps; whoever changes or keeps them copies.
        """
        content = bytearray(self.initial)
        yield 0, content
        for number, change in enumerate(self.changes, 1):
            apply(content, change)
            yield number, content

    def power_loss(self, count: int, choice: random.Random, keep: float = 0.5) -> bytearray:
        """Give one file that a power failure after ``count`` changes could have left.

        `tests.support.crashrecording` makes many; here each sector of a write, and each change of
        the length, is there or not with the chance ``keep``, but in their order.
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
    """Cut a write at sector boundaries."""
    offset, data = write
    while data:
        length = SECTOR - offset % SECTOR
        yield Write(offset, data[:length])
        offset, data = offset + length, data[length:]


@dataclass(eq=False)
class HeldCall:
    """Holds up one call: the caller has ``reached`` it, and waits for `open`.

    Used in a ``with`` block, which opens it at the end whatever happens.
    """

    reached: trio.Event = field(default_factory=trio.Event)
    _passed: trio.Event = field(default_factory=trio.Event)

    def release(self) -> None:
        """Let the call go on."""
        self._passed.set()

    def __enter__(self) -> Self:
        """Begin a block within which the call is held up."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the call go on."""
        self.release()

    async def wait(self) -> None:
        """Hold the caller up until `open`; like a system call, not to be cancelled."""
        self.reached.set()
        with trio.CancelScope(shield=True):
            await self._passed.wait()


@dataclass(frozen=True)
class _Fault:
    """What goes wrong: a host's error number, after ``short`` bytes of a write."""

    errno: int
    short: int = 0


class FailingFile:
    """A host file whose chosen calls fail or wait; all others go to ``inner``.

    Attributes:
        inner: The file behind this one.
        calls: How many calls of each kind there were.
    """

    def __init__(self, inner: HostFile) -> None:
        """Stand in front of ``inner``, without any fault yet."""
        self.inner = inner
        self.name = inner.name
        self.writable = inner.writable
        self.can_punch = inner.can_punch
        self.calls: Counter[Action] = Counter()
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
    ) -> None:
        """Make the ``nth`` call from now on fail, or all of them if ``nth`` is None.

        A write that fails has written its first ``short`` bytes.  A ``lasting`` fault
        makes all later calls fail as well, until `heal`.
        """
        fault = _Fault(number, short)
        if nth is None or lasting:
            self._always[action] = (self.calls[action] + (nth or 1), fault)
        else:
            self._faults[action, self.calls[action] + nth] = fault

    def limit(self, action: Action, below: int) -> None:
        """Let the faults of an action hit only calls at file offsets below ``below``."""
        self._below[action] = below

    def heal(self) -> None:
        """Forget all faults that have not struck yet."""
        self._faults.clear()
        self._always.clear()
        self._below.clear()

    def hold(self, action: Action, nth: int = 1) -> HeldCall:
        """Make the ``nth`` call from now on wait at a gate."""
        held = self._held_calls[action, self.calls[action] + nth] = HeldCall()
        return held

    async def _enter(self, action: Action, offset: int = 0) -> _Fault | None:
        """Count a call, wait where it is to wait, and tell how it is to fail."""
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
        error = OSError(fault.errno, os.strerror(fault.errno))
        raise HostError.from_os(error, self.name, action)

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
        """Do nothing: reads can wait and fail here."""
        return False

    def try_grow(self, *_: object) -> bool:
        """Do nothing: growing can wait and fail here."""
        return False

    def can_write_inline(self, _length: int) -> bool:
        """Say that none is: writes can wait and fail here."""
        return False

    def try_write(self, *_: object) -> bool:
        """Do nothing: writes can wait and fail here."""
        return False

    async def pwrite(self, offset: int, *parts: Buffer) -> None:
        """Write, or write less and fail."""
        if fault := await self._enter("write", offset):
            if fault.short:
                await self.inner.pwrite(offset, b"".join(parts)[: fault.short])
            self._raise(fault, "write")
        await self.inner.pwrite(offset, *parts)

    async def datasync(self) -> None:
        """Make durable, or fail."""
        if fault := await self._enter("datasync"):
            self._raise(fault, "datasync")
        await self.inner.datasync()

    async def truncate(self, size: int) -> None:
        """Set the length, or fail."""
        if fault := await self._enter("truncate"):
            self._raise(fault, "truncate")
        await self.inner.truncate(size)

    async def punch(self, *ranges: tuple[int, int]) -> None:
        """Give space back, or fail in the midst of it."""
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
        """Look for data as ``inner`` does."""
        return await self.inner.next_data(offset)

    async def next_hole(self, offset: int) -> int | None:
        """Look for a hole as ``inner`` does."""
        return await self.inner.next_hole(offset)

    def size(self) -> int:
        """Give the length of ``inner``."""
        return self.inner.size()

    def stat(self) -> os.stat_result:
        """Give the attributes of ``inner``."""
        return self.inner.stat()

    def statvfs(self) -> os.statvfs_result:
        """Describe the file system of ``inner``."""
        return self.inner.statvfs()

    async def set_times(self, atime_ns: int, mtime_ns: int) -> None:
        """Set the times of ``inner``."""
        await self.inner.set_times(atime_ns, mtime_ns)

    def close(self) -> None:
        """Close ``inner``."""
        self.inner.close()
