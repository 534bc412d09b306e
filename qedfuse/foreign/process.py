"""A process of qemu-nbd that serves one image, and ends with this process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from typing import TYPE_CHECKING, Final

from qedfuse.errors import ForeignError, HostError, ImageInUseError
from qedfuse.foreign.confined import find_program, spawn_confined
from qedfuse.foreign.sandbox import FIRST_FILE_DESCRIPTOR
from qedfuse.nbd import messages
from qedfuse.text import printable
from qedfuse.util.exitstatus import describe_exit
from qedfuse.util.timeval import NO_TIMEOUT, timeval

if TYPE_CHECKING:
    from qedfuse.foreign.graph import Graph

_PROGRAM: Final = "qemu-nbd"

READY_SECONDS: Final = 30.0
"""Maximum time for which a new connection waits for each part of the program's answer."""
_DISCONNECTED_SECONDS: Final = 2.0
_KILLED_SECONDS: Final = 0.5
"""Maximum times for which `QemuNbd.close` waits for the end of the program: after the disconnect,
and after SIGKILL.  There is no SIGTERM between them, because the program has blocked it."""

_GREETING: Final = messages.INIT_MAGIC + messages.OPTION_MAGIC
_FLAGS: Final = messages.FLAG_FIXED_NEWSTYLE | messages.FLAG_NO_ZEROES
_EXPORT_REPLY_BYTES: Final = 10
"""Length of the answer to ``NBD_OPT_EXPORT_NAME``: the size of the export and its flags."""

_OPTIONS_START: Final = "Failed to blk_new_open 'json:"
_OPTIONS_END: Final = "}': "
"""The texts before and after the options in QEMU's message about an image that it cannot open."""
_LOCK_MESSAGE: Final = "Failed to get "
"""Part of QEMU's message about a lock that another program holds."""
_MAX_MESSAGE_BYTES: Final = 4096
"""Maximum number of bytes that are read of the program's messages."""
_BACKLOG: Final = 64


class QemuNbd:
    """A process of qemu-nbd that serves an image and its backing files on a private socket.

    The program ends when its last client has disconnected, so this object keeps a connection of its
    own.

    Attributes:
        name: The name of the image in messages.
    """

    def __init__(self, graph: Graph, name: str) -> None:
        """Start the program; `wait_ready` waits until it serves.

        The kernel kills the program when the calling thread ends, so the thread must live until
        `close`.

        Raises:
            ForeignError: The program is not installed.
            HostError: A system call failed.
        """
        self.name = name
        self._closing = threading.Lock()
        """Held during `close`."""
        self._lock = threading.Lock()
        """Held while a descriptor is used or closed that threads share, and never during a wait."""
        self._is_closed = False
        self._names = [file.name for file in graph.files]
        program = find_program(_PROGRAM, name)
        options = "json:" + json.dumps(graph.options)
        arguments = [program, "--read-only", "--shared=0", options]
        with contextlib.ExitStack() as stack:
            try:
                listener, self._socket_path_fd = _private_listener()
                stack.callback(os.close, self._socket_path_fd)
                with listener:
                    # The connection stays in the queue of the listener until the program runs.
                    self._client = self.connect()
                    stack.callback(self._client.close)
                    self._messages = os.memfd_create("qemu-nbd", os.MFD_CLOEXEC)
                    stack.callback(os.close, self._messages)
                    self._process = spawn_confined(
                        *(arguments, graph, subprocess.DEVNULL, self._messages),
                        listener=listener.fileno(),
                    )
                stack.callback(self._process.kill)
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError as error:
                raise HostError.from_os(error, name, f"cannot run {_PROGRAM}") from error
            self._cleanup = stack.pop_all()

    def connect(self) -> socket.socket:
        """Return a new connection, which the program accepts later.

        The call blocks only while the queue of the listener is full, at most `READY_SECONDS`.

        Raises:
            OSError: The program has ended, does not accept connections, or a system call failed.
        """
        with self._lock:
            if self._is_closed:
                raise ConnectionRefusedError
            path_fd = os.dup(self._socket_path_fd)
        try:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # Not `settimeout`: on a full queue connect(2) of a non-blocking socket fails.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(READY_SECONDS))
                client.connect(f"/proc/self/fd/{path_fd}")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, NO_TIMEOUT)
            except BaseException:
                client.close()
                raise
        finally:
            os.close(path_fd)
        return client

    def connect_negotiated(self) -> socket.socket:
        """Return a new connection that is ready for requests, with simple replies; the call blocks.

        Raises:
            OSError: The program has ended, does not answer, or a system call failed.
        """
        client = self.connect()
        try:
            client.settimeout(READY_SECONDS)
            _negotiate(client)
        except BaseException:
            client.close()
            raise
        return client

    def wait_ready(self) -> None:
        """Wait until the program has opened the image; the call blocks.

        Raises:
            ForeignError: The program has refused the image, has ended, or does not answer.
            ImageInUseError: Another program holds a lock that excludes reading.
        """
        try:
            self._client.settimeout(READY_SECONDS)
            _negotiate(self._client)
        except TimeoutError as error:
            msg = (
                f"{self.name}: {_PROGRAM}: found no answer for {READY_SECONDS:.0f} s, expected one"
            )
            raise ForeignError(msg) from error
        except OSError as error:
            raise self._failure() from error

    def has_ended(self) -> bool:
        """Return whether the program has ended."""
        return self._is_closed or self._process.poll() is not None

    def end_reason(self) -> str:
        """Return why the program has ended or does not serve, as one printable line."""
        with self._lock:
            if self._is_closed:
                return "closed"
            output = os.pread(self._messages, _MAX_MESSAGE_BYTES, 0)
        status = self._process.poll()
        if status is None:
            return "runs, but does not answer as an NBD server"
        lines = output.decode(errors="replace").split("\n")
        errors = [line for line in lines if line.strip() and "warning:" not in line]
        if status > 0 and errors:
            return self._as_readable_line(errors[0].strip())
        return describe_exit(status)

    def kill(self) -> None:
        """Kill the program, so that no thread waits for it any longer; the call does not block."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if not self._is_closed:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Disconnect, and end the program if it does not end by itself; a later call does nothing.

        The call takes at most `_DISCONNECTED_SECONDS` and `_KILLED_SECONDS`.  A concurrent call
        waits for the first one.
        """
        with self._closing:
            if not self._is_closed:
                self._end()

    def _end(self) -> None:
        """Disconnect, end the program, and close all descriptors."""
        with contextlib.suppress(OSError):
            self._client.settimeout(0)
            self._client.send(messages.request(messages.CMD_DISC, 0, 0, 0))
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)
        if not self._wait(_DISCONNECTED_SECONDS):
            self.kill()
            self._wait(_KILLED_SECONDS)
        with self._lock:
            self._is_closed = True
            os.close(self._pidfd)
            self._cleanup.close()

    def _as_readable_line(self, line: str) -> str:
        """Return a message of the program as printable text, with names instead of descriptors."""
        line = printable(line.removeprefix(f"{_PROGRAM}: "))
        if line.startswith(_OPTIONS_START):
            line = line.rpartition(_OPTIONS_END)[2]
        for number, name in enumerate(self._names, FIRST_FILE_DESCRIPTOR):
            line = line.replace(f"/proc/self/fd/{number}", name)
        return line

    def _failure(self) -> ForeignError | ImageInUseError:
        """Return the error to raise after a failed negotiation with the program."""
        self._wait(_DISCONNECTED_SECONDS)
        reason = self.end_reason()
        if _LOCK_MESSAGE in reason:
            return ImageInUseError(f"{self.name}: in use: {_PROGRAM}: {reason}")
        return ForeignError(f"{self.name}: {_PROGRAM}: {reason}")

    def _wait(self, seconds: float) -> bool:
        """Wait for the end of the program; return whether it has ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def _private_listener() -> tuple[socket.socket, int]:
    """Return a listening socket that no other user can reach, and a descriptor of its path.

    The path itself is removed; clients connect through the descriptor.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        directory = tempfile.mkdtemp(prefix="qedfuse-")
        path = os.path.join(directory, "nbd")  # noqa: PTH118
        try:
            # Bind by a descriptor: the path can be too long for the address of a socket.
            handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                listener.bind(f"/proc/self/fd/{handle}/nbd")
            finally:
                os.close(handle)
            path_fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            listener.listen(_BACKLOG)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    except BaseException:
        listener.close()
        raise
    return listener, path_fd


def _negotiate(client: socket.socket) -> None:
    """Choose the default export by the option ``NBD_OPT_EXPORT_NAME``; raise OSError on failure."""
    greeting = _receive(client, len(_GREETING) + 2)
    if not greeting.startswith(_GREETING):
        msg = f"found {greeting!r}, expected a greeting"
        raise OSError(msg)
    client.sendall(_FLAGS.to_bytes(4, "big") + messages.option(messages.OPT_EXPORT_NAME))
    _receive(client, _EXPORT_REPLY_BYTES)


def _receive(client: socket.socket, length: int) -> bytes:
    """Return the next ``length`` bytes of a connection; raise OSError if they do not come."""
    data = b""
    while len(data) < length:
        part = client.recv(length - len(data))
        if not part:
            raise ConnectionResetError
        data += part
    return data
