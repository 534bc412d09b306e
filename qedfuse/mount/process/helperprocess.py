"""A helper process of the server: forked before the mount exists, and connected by a socket.

A helper executes no program, because the files of a program may lie under the mountpoint.  The
helper sleeps until the server sends a message.  It ends when the server ends or closes its end of
the socket.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

from qedfuse.util.descriptors import (
    STANDARD,
    close_descriptors,
    discard_standard_streams,
    open_descriptors,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import TracebackType
    from typing import Self

_MAX_END_SECONDS: Final = 5.0
"""Maximum time for which the server waits for the end of the helper."""
_END_CHECK_SECONDS: Final = 0.002
"""Time between two checks whether the helper has ended."""


class HelperProcess:
    """A helper as the server sees it: a child process and a socket to it.

    Attributes:
        socket: The server's end of the socket pair, which keeps the boundaries of messages.
        pid: The pid of the helper.
    """

    def __init__(self, serve: Callable[[socket.socket], None], kept: Collection[int] = ()) -> None:
        """Fork the helper; only the server returns from this call.

        The caller must not have a second thread, because a lock that the thread held would stay
        locked in the helper forever.

        Args:
            serve: Called in the helper with its end of the socket pair; then the helper ends.
            kept: Further descriptors that stay open in the helper.  Its socket always does, and its
                standard streams lead to /dev/null.

        Raises:
            OSError: The host refuses a socket pair or a process.
        """
        self.socket, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with child_end:
            try:
                self.pid = os.fork()
            except OSError:
                self.socket.close()
                raise
            if self.pid == 0:
                _be_child(child_end, serve, kept)

    def __enter__(self) -> Self:
        """Return this object; the constructor has started the helper."""
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Stop the helper and wait for its end, at most 5 seconds."""
        self.stop()
        self.wait()

    def stop(self) -> None:
        """Make the helper end, by closing the server's end; a second call does nothing."""
        self.socket.close()

    def wait(self) -> bool:
        """Wait for the end of the helper, at most 5 seconds; return whether it has ended."""
        deadline = time.monotonic() + _MAX_END_SECONDS
        # A pidfd would not need a loop, but there may be no free descriptor at the end of a mount.
        with suppress(ChildProcessError):  # an earlier call has waited for the helper's end
            while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    return False
                time.sleep(_END_CHECK_SECONDS)
        return True


def _be_child(
    commands: socket.socket, serve: Callable[[socket.socket], None], kept: Collection[int]
) -> NoReturn:
    """Run as the helper in the forked process, and exit; the call never returns."""
    try:
        # The server ends the helper, after the mount.  So a signal that is sent to all processes
        # of a terminal or of a service must not end it earlier.
        os.setsid()
        for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signal_number, signal.SIG_IGN)
        # When the server ends, its locks, pipes, terminal and directory must become free.
        os.chdir("/")
        discard_standard_streams()
        close_descriptors(open_descriptors() - {*STANDARD, *kept, commands.fileno()})
        serve(commands)
    finally:
        os._exit(0)
