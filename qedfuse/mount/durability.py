"""Making everything durable that the kernel and the server hold of the disks of a mount."""

from __future__ import annotations

import logging
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

import trio

from qedfuse.errors import HostError, QedError
from qedfuse.mount.system.unmount import sync_mount
from qedfuse.text import printable
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.mount.fuse.exporteddisk import ExportedDisk, ExportedDisks
    from qedfuse.mount.fuse.laundering import Laundering

_log = logging.getLogger(__name__)

_FLUSH_SECONDS: Final = 1.0
"""Time between two flushes of a disk that waits for laundering."""
_FAILURES: Final = (OSError, QedError)
"""Exceptions that are logged, and that keep no other disk from being made durable."""


async def flush_mount(
    disks: ExportedDisks,
    laundering: Laundering | None,
    mountpoint: str,
    is_mounted: Callable[[], bool],
) -> bool:
    """Make the kernel write back its dirty pages, and make all disks of a mount durable.

    Failures are logged.

    Args:
        disks: The disks of the mount.
        laundering: Makes the kernel write back its dirty pages; None if it caches no pages.
        mountpoint: The mountpoint.
        is_mounted: Returns whether the topmost mount on the mountpoint is this mount.

    Returns:
        True if everything that the kernel had cached before this call is durable.
    """
    durable = True
    unsure: list[ExportedDisk] = []

    @contextmanager
    def logged_failures() -> Iterator[None]:
        nonlocal durable
        try:
            yield
        except _FAILURES as error:
            durable = False
            _log.error("%s: cannot make everything durable: %s", printable(mountpoint), error)

    async def sync() -> None:
        with logged_failures():
            if is_mounted():
                # With the option ``uid`` the server may be excluded from its own mount.
                # Laundering writes back the same pages, and reports if it cannot.
                with suppress(PermissionError):
                    await run_in_thread(sync_mount, mountpoint, abandon_on_cancel=True)

    async def make_durable(exported: ExportedDisk) -> None:
        with logged_failures():
            if not await _launder(exported, laundering):
                unsure.append(exported)
        with logged_failures():
            await exported.disk.flush()

    # All at the same time, because a disk whose host does not answer must not delay the others.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sync)
        for exported in disks:
            nursery.start_soon(make_durable, exported)
    # Before Linux 6.16 laundering fails while the kernel sends pages of other disks for more than a
    # second.  Now it has sent those that it had.
    for exported in unsure:
        with logged_failures():
            if not await _launder(exported, laundering):
                name = exported.disk.name
                msg = f"{name}: the kernel may have data that it has not written back"
                raise HostError(msg)
            await exported.disk.flush()
    return durable


async def _launder(exported: ExportedDisk, laundering: Laundering | None) -> bool:
    """Make the kernel write back its dirty pages of a disk; return whether it has done so.

    This may have to wait until another disk is laundered, whose host does not answer.  Meanwhile
    `sync_mount` makes the kernel send the pages of this disk.  So until this disk is laundered,
    what the server has received is made durable each `_FLUSH_SECONDS`.
    """

    async def flush() -> None:
        with suppress(*_FAILURES):  # the flush after laundering meets and reports the same
            await exported.disk.flush()

    async def flush_repeatedly() -> None:
        while True:
            await trio.sleep(_FLUSH_SECONDS)
            await flush()

    await flush()
    if laundering is None or not exported.writers:
        return True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flush_repeatedly)
        # `sync_mount` may return before the writeback has ended; `launder` does not.
        written_back = await laundering.launder(exported)
        nursery.cancel_scope.cancel()
    return written_back
