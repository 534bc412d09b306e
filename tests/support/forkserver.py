"""Processes that run the command, forked from a *fork server*, which has loaded its modules before.

A new interpreter takes a third of a second of the processor until it has loaded what a mount needs,
and the tests make a thousand mounts.  A forked process has a process id, descriptors, signals and
an exit of its own like any other, and runs the same code from the entry point on; only how modules
are loaded is not tested by it.  So what depends on that, on the command line in /proc, or on a
patched module starts a new interpreter, and so does every test if `NEW_INTERPRETERS` is set.

At its end a forked process does all that a program can notice, and then calls ``os._exit``: an
interpreter that shuts down writes to the memory of each module, which the kernel copies, and that
took three quarters of the processor time of a short command.

Each test process has fork servers of its own, in its mount namespace; they end with it.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NEW_INTERPRETERS: Final = os.environ.get("QEDFUSE_TEST_START") == "new"
"""Whether each process must be a new interpreter."""

_TREE: Final = Path(__file__).parents[2]
_MAX_REQUEST_BYTES: Final = 1 << 17
_LISTENER: Final = 3
"""The descriptor of a fork server at which it receives requests."""


class ForkedProcess:
    """A process of a fork server; it offers what the tests use of `subprocess.Popen`.

    Attributes:
        args: Its arguments.
        pid: Its process id.
        returncode: Its exit code, negative if a signal has ended it; None before it was awaited.
        stdout: A pipe from its standard output, if one was requested.
        stderr: A pipe from its standard error, if one was requested.
    """

    def __init__(self, args: Sequence[str], status: socket.socket, *pipes: IO[str] | None) -> None:
        """Wrap a process; its fork server sends its id, and later its exit code, to ``status``."""
        self.args = args
        self._status = status
        self._received = b""
        self.stdout, self.stderr = pipes
        self.returncode: int | None = None
        self.pid = self._next_number(None)

    def _next_number(self, timeout: float | None) -> int:
        while b"\n" not in self._received:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            more = self._status.recv(64)
            assert more, "the fork server has ended"
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return int(line)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit and return its code.

        Raises:
            subprocess.TimeoutExpired: It has not ended after ``timeout`` seconds.
        """
        if self.returncode is None:
            self.returncode = self._next_number(timeout)
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, None if the process has not ended."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        # The fork server has not yet reaped a process whose exit code it has not sent.
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both pipes to their ends, wait for the exit, and return what was read.

        Raises:
            subprocess.TimeoutExpired: That takes more than ``timeout`` seconds.
        """
        ends = None if timeout is None else time.monotonic() + timeout
        found = {pipe: b"" for pipe in (self.stdout, self.stderr) if pipe is not None}
        waits = list(found)
        while waits:
            left = None if ends is None else max(0, ends - time.monotonic())
            ready = select.select(waits, [], [], left)[0]
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            for pipe in ready:
                more = os.read(pipe.fileno(), 1 << 16)
                found[pipe] += more
                if not more:
                    waits.remove(pipe)
        self.wait(None if ends is None else max(0, ends - time.monotonic()))
        texts = [
            "" if pipe is None else found[pipe].decode(errors="backslashreplace")
            for pipe in (self.stdout, self.stderr)
        ]
        self.close()
        return texts[0], texts[1]

    def close(self) -> None:
        """Close the pipes."""
        for pipe in (self.stdout, self.stderr):
            if pipe is not None:
                pipe.close()


def start(
    code: str,
    arguments: Sequence[str],
    preloaded: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
) -> ForkedProcess:
    """Start a process that runs Python code with arguments, like ``python -c CODE ARGUMENT...``.

    The modules ``preloaded`` are loaded before.  Standard input is /dev/null; ``stdout`` and
    ``stderr`` are `subprocess.PIPE` or `subprocess.DEVNULL`.
    """
    server = _server(tuple(preloaded))
    status, theirs = socket.socketpair()
    null = os.open(os.devnull, os.O_RDWR)
    descriptors, pipes = [null], list[IO[str] | None]()
    for wanted in (stdout, stderr):
        if wanted == subprocess.PIPE:
            reading, writing = os.pipe()
            pipes.append(open(reading, encoding="utf-8", errors="backslashreplace"))  # noqa: PTH123, SIM115  a descriptor
            descriptors.append(writing)
        else:
            pipes.append(None)
            descriptors.append(null)
    request = {
        "code": code,
        "arguments": list(arguments),
        "environment": dict(os.environ if environment is None else environment),
        "directory": os.fspath(cwd) if cwd is not None else os.getcwd(),  # noqa: PTH109
        "numbers": [0, 1, 2, *pass_fds],
    }
    text = json.dumps(request).encode()
    assert len(text) < _MAX_REQUEST_BYTES
    with theirs:
        socket.send_fds(server, [text], [theirs.fileno(), *descriptors, *pass_fds])
    for descriptor in set(descriptors):
        os.close(descriptor)
    return ForkedProcess(arguments, status, *pipes)


@cache
def _server(preloaded: tuple[str, ...]) -> socket.socket:
    """Start a fork server that loads modules; return where it receives requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", __name__, *preloaded],
            {
                **os.environ,
                "PYTHONPATH": str(_TREE),
                "PYTHONWARNINGS": "error",
                "OPENBLAS_NUM_THREADS": "1",  # no threads, with which a process must not fork
            },
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), _LISTENER),
            ],
        )

    def end() -> None:
        ours.close()
        os.waitpid(pid, 0)

    atexit.register(end)
    return ours


def _serve() -> dict[str, Any] | None:
    """Fork a process for each request; return it in each, and None in the server at its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of the test process ends the server
    listener = socket.socket(fileno=_LISTENER)
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for descriptor in select.select([_LISTENER, *running], [], [])[0]:
            if descriptor != _LISTENER:
                pid, status = running.pop(descriptor)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.close(descriptor)
                with status, suppress(OSError):
                    status.sendall(b"%d\n" % code)
                continue
            text, descriptors, _, _ = socket.recv_fds(listener, _MAX_REQUEST_BYTES, 64)
            if not text:
                listener.close()
                return None
            request: dict[str, Any] = json.loads(text)
            pid = os.fork()
            if not pid:
                for _, status in running.values():
                    status.detach()
                listener.detach()
                _take(descriptors[1:], request["numbers"])
                return request
            for number in descriptors[1:]:
                os.close(number)
            status = socket.socket(fileno=descriptors[0])
            running[os.pidfd_open(pid)] = (pid, status)
            with suppress(OSError):
                status.sendall(b"%d\n" % pid)


def _take(descriptors: list[int], numbers: list[int]) -> None:
    """Give received descriptors their numbers, and close all others."""
    import fcntl  # noqa: PLC0415  only here

    above = max(*numbers, *descriptors, 100) + 1
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, above) for number in descriptors]
    os.closerange(3, above)
    for descriptor, number in zip(moved, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _become(request: dict[str, Any]) -> dict[str, Any]:
    """Make this process look like a new one; return the namespace of its main module."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        mode = "w" if number else "r"
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115  a descriptor
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["-c", *request["arguments"]]
    main = sys.modules["__main__"] = type(sys)("__main__")
    return vars(main)


def _run(code: str, namespace: dict[str, Any]) -> None:
    """Run code, and end the process when it ends.

    An exception that is not caught, and an exit code that is printed, are left to the interpreter.
    """
    try:
        exec(code, namespace)  # noqa: S102  the code is that of a test
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise
        exit_code = end.code or 0
    else:
        exit_code = 0
    # Only here, after the block, no frame of the program is referred to any more.
    _end(exit_code, namespace)


def _end(code: int, namespace: dict[str, Any]) -> None:
    """End the process with an exit code, without freeing what the fork server has loaded.

    Like an interpreter that shuts down, it runs the functions of `atexit`, collects what is left,
    so that open files warn, and flushes both streams.  If a thread must be joined or a stream
    cannot be flushed, it leaves the end to the interpreter.
    """
    others = set(threading.enumerate()) - {threading.current_thread()}
    if all(thread.daemon for thread in others):
        atexit._run_exitfuncs()
        namespace.clear()
        gc.collect()
        with suppress(OSError, ValueError):
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code & 0xFF)
    sys.exit(code)


if __name__ == "__main__":
    os.closerange(_LISTENER + 1, os.sysconf("SC_OPEN_MAX"))  # what the test process inherited
    for module in sys.argv[1:]:
        __import__(module)
    # Otherwise the collector would visit, and so copy, the objects of all modules in each process.
    gc.freeze()
    accepted = _serve()
    if accepted is not None:
        _run(accepted["code"], _become(accepted))
