"""Forking the helper processes of a mount, before there is an event loop."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING

from qedfuse.mount.fuse.launderer import Launderer
from qedfuse.mount.process.unmounter import DirectUnmounter, HelperUnmounter

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from qedfuse.mount.process.unmounter import Unmounter

_log = logging.getLogger(__name__)


def forked_launderer(*, is_needed: bool) -> AbstractContextManager[Launderer | None]:
    """Fork the launderer; the block gets None if no launderer is needed or the fork fails."""
    if not is_needed:
        return nullcontext()
    try:
        return Launderer()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        _log.warning(
            "cannot start the launderer (a helper process), so lseek(2) reports holes as data in "
            "disks that are open for writing: %s",
            reason,
        )
        return nullcontext()


def forked_unmounter(
    mountpoint: str, log: logging.Handler | None, *, for_sandbox: bool
) -> AbstractContextManager[Unmounter | None]:
    """Fork the unmounter if a sandbox is wanted; otherwise use a `DirectUnmounter`.

    The block gets None if the fork has failed; then there can be no sandbox.

    Args:
        mountpoint: The mountpoint; absolute and free of symbolic links.
        log: The handler of the server's log, which an unmounter in a process of its own connects to
            the log daemon; None if the log goes to stderr.
        for_sandbox: Whether a sandbox is wanted.
    """
    if not for_sandbox:
        return nullcontext(DirectUnmounter(mountpoint))
    try:
        return HelperUnmounter(mountpoint, log)
    except OSError:
        return nullcontext()
