"""Running QEMU's programs on the files of a chain, confined to these files."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from qedfuse.errors import ForeignError
from qedfuse.foreign.sandbox import launch_command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qedfuse.foreign.graph import Graph

_PACKAGE: Final = "qemu-utils"
"""The Debian package that contains the programs."""
_KILLED_SECONDS: Final = 0.5
"""Maximum time for which `end_process` waits for the end of a process that it has killed."""


def find_program(program: str, name: str) -> str:
    """Return the path of a program of QEMU; ``name`` is the name of the image in messages.

    Raises:
        ForeignError: The program is not installed.
    """
    found = shutil.which(program)
    if found is None:
        msg = (
            f"{name}: found no program {program}, expected it to be installed (package {_PACKAGE})"
        )
        raise ForeignError(msg)
    return os.path.realpath(found)


def spawn_confined(
    command: Sequence[str],
    graph: Graph,
    output: int,
    errors: int,
    *,
    listener: int | None = None,
    cpu_seconds: int | None = None,
) -> subprocess.Popen[bytes]:
    """Start a program in a sandbox; return its process.

    Ctrl-C does not end the program, because it has a session of its own.  The kernel kills it when
    the thread that called this function ends.

    Args:
        command: The program's absolute path and its arguments.
        graph: The files that the program may read.
        output: Where the program's standard output goes, as for `subprocess.Popen`.
        errors: Where the program's standard error goes, as for `subprocess.Popen`.
        listener: Descriptor of a listening socket for the program; None for no socket.
        cpu_seconds: Maximum processor time of the program in seconds; None for no limit.

    Raises:
        OSError: A system call failed.
    """
    files = [file.fd for file in graph.files]
    extents = [file.fd for file in graph.extents]
    passed = () if listener is None else (listener,)
    # No Python code may run between fork and exec (so there is no ``preexec_fn``): a lock that
    # another thread holds at the fork would stay locked in the new process.
    return subprocess.Popen(  # noqa: S603  no shell, and no name from an image
        launch_command(list(command), files, listener, extents, cpu_seconds),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        pass_fds=(*files, *extents, *passed),
        start_new_session=True,
        cwd="/",
        env={},
    )


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Kill a process if it has not ended, and wait for its end, at most `_KILLED_SECONDS`.

    A process that waits for the host's disk ends only when the disk has answered.
    """
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_KILLED_SECONDS)
