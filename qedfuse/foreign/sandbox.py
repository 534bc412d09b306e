"""Starting a program that can read only given files; a part of this module runs as a script.

A new process must give up its rights itself, after fork and before exec.  In a process with several
threads no Python code may run between these two.  So this file is run as a script, which gives up
the rights and then replaces itself by the program.  It must import nothing of this project but
`qedfuse.util.landlock`.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import signal
import sys

if __name__ == "__main__":
    # The script runs without site packages, so it finds this project by its own path.
    sys.path.append(__file__.removesuffix("/qedfuse/foreign/sandbox.py"))

from qedfuse.util import landlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38

_SYSTEM_PATHS = (
    *("/usr/bin", "/usr/local/bin", "/bin"),
    *("/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/local/lib"),
    *("/lib", "/lib64", "/etc/ld.so.cache", "/nix/store", "/gnu/store"),
)
"""What every program may read and execute: libraries, QEMU's modules, and commands, in case the
program is a script."""
_OWN_DIRECTORIES = ("lib", "lib64", "libexec")
"""Directories of the libraries of a program outside ``/usr``, beside the directory of the program:
``/opt/qemu/bin/qemu-nbd`` has its libraries in ``/opt/qemu/lib``, for example."""

FIRST_FILE_DESCRIPTOR = 100
"""The descriptor of the first file in the program; the next files have the next numbers."""

_BLOCKED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that do not end the program.  systemd sends them to all processes of a service or a login
session, but the server goes on while a disk is in use, and then needs the program."""

_MAX_MESSAGE_BYTES = 64 << 10
"""Maximum length of a file that the program writes.  It writes only its messages."""

_libc = ctypes.CDLL(None, use_errno=True)


def launch_command(
    program: list[str],
    files: list[int],
    listener: int | None,
    named: Sequence[int] = (),
    cpu_seconds: int | None = None,
) -> list[str]:
    """Return the command that starts ``program`` with the right to read only the given files.

    The program can also read and run programs and libraries (`_SYSTEM_PATHS`).  The kernel kills it
    when the thread that has started the command ends; `_BLOCKED_SIGNALS` do not end it.  Without
    Landlock in the kernel, it can read all files of the user.

    Args:
        program: The program's absolute path and its arguments.
        files: Descriptors of the files that the program may open for reading.  The command must
            inherit them.  In the program they have the numbers from `FIRST_FILE_DESCRIPTOR` on.
        listener: Descriptor of a listening socket, which the program gets as systemd would pass it;
            None for no socket.
        named: Descriptors of further files that the program may open by their names.  The command
            must inherit these descriptors.
        cpu_seconds: Maximum processor time of the program in seconds; None for no limit.
    """
    parameters = {
        "parent": os.getpid(),
        "program": program,
        "files": files,
        "listener": listener,
        "named": list(named),
        "cpu_seconds": cpu_seconds,
    }
    # The options: no Python variables of the environment, no site packages, no bytecode files.
    return [sys.executable, "-I", "-S", "-B", __file__, json.dumps(parameters)]


def _raise_descriptor_limit(needed: int) -> None:
    """Raise the limit of open files to the hard limit; end the process if it is below ``needed``.

    A VMDK image can have many extents.  A refusal by the kernel is ignored.
    """
    maximum = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))
    except (OSError, ValueError):  # the sysctl fs.nr_open was lowered below the hard limit
        maximum = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if maximum != resource.RLIM_INFINITY and maximum < needed:
        remedy = "(see: ulimit -Hn; for a service: LimitNOFILE=)"
        sys.exit(f"found a limit of {maximum} open files, expected {needed} or more {remedy}")


def _lower_limit(kind: int, wanted: int) -> None:
    """Set a limit of this process to ``wanted``, or to the present hard limit if that is lower.

    The hard limit cannot be raised by an ordinary user, and must not be raised by root.
    """
    hard = resource.getrlimit(kind)[1]
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (limit, limit))


def _restrict(version: int, files: list[int], programs: list[str]) -> None:
    """Give up all rights of this process on files, except to read ``files`` and run ``programs``.

    ``programs`` are files and directories; those that do not exist are left out.
    """
    rules = landlock.Ruleset(version)
    for fd in files:
        rules.allow(fd, landlock.READ_FILE)
    # QEMU opens this file to find out which kinds of locks the kernel has.
    rules.try_allow_path("/dev/null", landlock.READ_FILE | landlock.WRITE_FILE)
    for path in programs:
        rules.try_allow_path(path, landlock.EXECUTE | landlock.READ_FILE | landlock.READ_DIRECTORY)
    rules.restrict_self()
    rules.close()


def _main(text: str) -> None:
    """Give up rights, and replace this process by the program; see `launch_command`."""
    parameters = json.loads(text)
    program = parameters["program"]
    # execve keeps the mask, and no program of QEMU that is started here changes it.
    signal.pthread_sigmask(signal.SIG_SETMASK, _BLOCKED_SIGNALS)
    landlock.check_result(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parameters["parent"]:
        return  # the parent ended before prctl, so no signal would come
    _lower_limit(resource.RLIMIT_CORE, 0)
    _lower_limit(resource.RLIMIT_FSIZE, _MAX_MESSAGE_BYTES)
    if parameters["cpu_seconds"] is not None:
        _lower_limit(resource.RLIMIT_CPU, parameters["cpu_seconds"])
    landlock.check_result(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    listeners = [] if parameters["listener"] is None else [parameters["listener"]]
    given = (*parameters["files"], *parameters["named"], *listeners)
    # The temporary copies have numbers above all final ones, so none is overwritten when another
    # file gets its final number.
    first_copy = FIRST_FILE_DESCRIPTOR + len(parameters["files"])
    _raise_descriptor_limit(first_copy + len(given))
    opened = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first_copy) for fd in given]
    # The program must not inherit the originals.  closerange does not reach the highest numbers, so
    # all are marked to be closed by execve.
    for fd in given:
        os.set_inheritable(fd, False)  # noqa: FBT003
    os.closerange(3, first_copy)
    if listeners:
        os.dup2(opened.pop(), 3)
    files = opened[: len(parameters["files"])]
    for number, fd in enumerate(files, FIRST_FILE_DESCRIPTOR):
        os.dup2(fd, number)
    version = landlock.landlock_version()
    if version:
        # A program in a prefix of its own has its libraries in the same prefix.
        prefix = os.path.dirname(os.path.dirname(program[0]))  # noqa: PTH120
        own = [program[0], *(f"{prefix}/{name}" for name in _OWN_DIRECTORIES)]
        _restrict(version, opened, [*_SYSTEM_PATHS, *own])
    variables = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())} if listeners else {}
    os.execve(program[0], program, variables)  # noqa: S606  no shell is wanted


if __name__ == "__main__":
    try:
        _main(sys.argv[1])
    except OSError as error:
        sys.exit(f"{error.strerror}")
