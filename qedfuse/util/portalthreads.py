"""The threads of portals, and the watcher that closes the portals when the program ends."""

from __future__ import annotations

import gc
import os
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, Protocol

from qedfuse.util.threads import HelperThread, start_thread

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


serves_portal: Final = ContextVar("serves_portal", default=False)
"""True in the event loop of a portal.  Trio copies it to the tasks and to their calls in its worker
threads."""


class _Collector(threading.local):
    """Whether the garbage collector is running in the current thread."""

    is_running = False


_collector: Final = _Collector()


def _note_collection(
    phase: str,
    _info: dict[str, int],
    # Bound here, because the collector can run when Python has already cleared this module.
    collector: _Collector = _collector,
) -> None:
    """Note that a collection begins or ends in the current thread."""
    collector.is_running = phase == "start"


gc.callbacks.append(_note_collection)


def in_portal_thread() -> bool:
    """Return whether the caller is a finalizer in a thread that portals use.

    The garbage collector can run in any thread.  A finalizer in one of these threads must wait for
    no portal and for no lock that is held during a call of a portal: an event loop would stand
    still, or wait for the thread, and so for the finalizer.  The threads are:

    - the threads of the event loops, and this package's own threads;
    - the worker threads of trio, during a call from a portal;
    - the same threads between two calls, when an event loop may already wait for the next one.
      Because the program can use trio as well, the caller is then a finalizer only if the collector
      is running.
    """
    thread = threading.current_thread()
    return (
        isinstance(thread, PortalThread | HelperThread)
        or serves_portal.get()
        # The threads of trio are daemons.
        or (thread.daemon and _collector.is_running)
    )


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
