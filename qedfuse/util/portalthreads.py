"""The threads of portals, and the watcher that closes the portals when the program ends."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final, Protocol

from qedfuse.util.threads import start_thread

if TYPE_CHECKING:
    from collections.abc import Callable


class Closable(Protocol):
    """What the watcher knows of a portal."""

    def ask_to_close(self) -> None:
        """Start to close the portal, and return without waiting until it is closed."""


class PortalThread(threading.Thread):
    """The thread of a portal, as distinct from the program's own threads.

    Not a daemon, because Python must wait until the portal's context manager has been left.
    """

    def __init__(self, run: Callable[[], object], name: str) -> None:
        """Prepare to call ``run`` in a thread with this name."""
        super().__init__(target=run, name=name, daemon=False)


def in_portal_thread() -> bool:
    """Return whether the caller runs in the thread of a portal.

    Such a caller is a finalizer, as the program's code does not run there: the garbage collector
    can run in any thread.  It must not wait for a portal: it would wait for itself, or an event
    loop would stand still.
    """
    return isinstance(threading.current_thread(), PortalThread)


class _Watcher:
    """Closes the portals that are still open when the program ends.

    The methods may be called in any thread: each change of the set is a single step.
    """

    def __init__(self) -> None:
        self._reset()
        # If another thread held the lock during a fork, the lock would stay locked in the child.
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Watch no portal; in a forked child, the parent's portals have no threads."""
        self._lock = threading.Lock()  # held while `_thread` is being started
        self._portals: set[Closable] = set()
        self._thread: threading.Thread | None = None

    def watch(self, portal: Closable) -> None:
        """Arrange that ``portal`` is closed when the program ends, if it is still open then.

        Raises:
            OSError: The host cannot start a thread.
        """
        self._portals.add(portal)
        with self._lock:
            # One thread watches all portals.
            if self._thread is None or not self._thread.is_alive():
                self._thread = start_thread(self._run, name="portals")

    def forget(self, portal: Closable) -> None:
        """Stop watching a portal that has ended."""
        # Without the lock: the thread that holds it may run a finalizer that waits for this portal.
        self._portals.discard(portal)

    def _run(self) -> None:
        """Wait for the end of the program, then close the portals that are open."""
        threading.main_thread().join()
        # Wait for all threads but daemons, as Python itself does: they may still use a portal.
        # The threads of portals end only when the portals are closed.
        while users := [
            thread
            for thread in threading.enumerate()
            if thread.is_alive() and not thread.daemon and not isinstance(thread, PortalThread)
        ]:
            for thread in users:
                thread.join()
        for portal in list(self._portals):
            portal.ask_to_close()


watcher: Final = _Watcher()
"""The watcher of this process."""
