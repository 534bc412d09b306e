"""Starting a thread on a host that may refuse it."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, TypeVarTuple

if TYPE_CHECKING:
    from collections.abc import Callable

Args = TypeVarTuple("Args")


def start_thread(
    function: Callable[[*Args], object], *args: *Args, name: str | None = None
) -> threading.Thread:
    """Call a function in a new daemon thread; return the thread, which has been started.

    Raises:
        OSError: The host cannot start a thread (EAGAIN), for example because a limit of processes
            is reached.
    """
    thread = threading.Thread(target=function, args=args, name=name, daemon=True)
    start(thread)
    return thread


def start(thread: threading.Thread) -> None:
    """Start ``thread``, which must not have been started before.

    Raises:
        OSError: As in `start_thread`.
    """
    try:
        thread.start()
    except (RuntimeError, MemoryError) as error:
        raise OSError(errno.EAGAIN, f"cannot start a thread: {error}") from error
