"""Starting a program that can read only given files; a part of this module runs as a script.

A new process must give up its rights itself, after fork and before the exec of the program.  In a
process with several threads no Python code may run between fork and exec.  So this file is run as a
script, which gives up the rights and then replaces itself by the program.  The file must import
nothing of this project.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import signal
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_CREATE_RULESET = 444
_ADD_RULE = 445
_RESTRICT_SELF = 446
"""Numbers of the system calls of Landlock, which are the same on all architectures but Alpha."""

_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Number of rights on files by version of Landlock; later versions count as the last one here."""
_NETWORK_VERSION, _ALL_TCP = 4, 0b11
_SCOPE_VERSION, _ALL_SCOPES = 6, 0b11
"""The first version that can forbid TCP, and the first that can forbid signals to processes outside
of the sandbox and connections to their abstract sockets."""

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38

_SYSTEM_PATHS = (
    *("/usr/bin", "/usr/local/bin", "/bin"),
    *("/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/local/lib"),
    *("/lib", "/lib64", "/etc/ld.so.cache", "/nix/store", "/gnu/store"),
)
"""Where libraries and QEMU's modules are installed, and the commands of a script that runs QEMU."""
_OWN_DIRECTORIES = ("lib", "lib64", "libexec")
"""Where a program with another prefix has its libraries and modules, relative to the prefix."""

FIRST_FILE_DESCRIPTOR = 100
"""The descriptor of the first file in the program; the next files have the next numbers."""

_FIRST_TEMPORARY_DESCRIPTOR = 300
"""First number for temporary copies of descriptors, which then get their final numbers."""

_MAX_MESSAGE_BYTES = 64 << 10
"""Maximum length of a file that the program writes: only its messages go to a file."""

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """Return the version of the kernel's Landlock ABI; 0 if Landlock is missing or switched off."""
    size = ctypes.c_size_t(0)
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, size, _VERSION_FLAG)))


def launch_command(
    program: list[str], files: list[int], listener: int, named: Sequence[int] = ()
) -> list[str]:
    """Return the command that starts ``program`` with the right to read only ``files``.

    The kernel kills the program when the thread that has started the command ends.

    Args:
        program: The program's absolute path and its arguments.
        files: Descriptors of the files that may be opened for reading, which must be inherited; in
            the program they have the numbers from `FIRST_FILE_DESCRIPTOR` on.
        listener: Descriptor of a listening socket, which the program gets as systemd would pass it.
        named: Descriptors of further files that may be opened, which must be inherited; the program
            opens them under their names and does not get the descriptors.
    """
    order = {
        "parent": os.getpid(),
        "program": program,
        "files": files,
        "listener": listener,
        "named": list(named),
    }
    # The options: no Python variables of the environment, no site packages, no bytecode files.
    return [sys.executable, "-I", "-S", "-B", __file__, json.dumps(order)]


def _raise_descriptor_limit() -> None:
    """Raise the limit of open files as far as the host permits, because VMDK has many extents.

    Raises:
        OSError: The host refused.
    """
    maximum = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))


def _check(result: int, action: str) -> int:
    """Return the result of a system call; raise OSError if it has failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{action}: {os.strerror(number)}")
    return result


def _restrict(version: int, files: list[int], programs: list[str]) -> None:
    """Give up all rights of this process on files, except reading given files and running programs.

    Args:
        version: The version of Landlock.
        files: Descriptors of files that may still be opened for reading.
        programs: Files and directories whose content may still be read and run; those that do not
            exist are left out.

    Raises:
        OSError: The kernel refused.
    """
    handled = (1 << _FILE_RIGHTS.get(version, max(_FILE_RIGHTS.values()))) - 1
    attributes = struct.pack("=Q", handled)
    if version >= _NETWORK_VERSION:
        attributes += struct.pack("=Q", _ALL_TCP)
    if version >= _SCOPE_VERSION:
        attributes += struct.pack("=Q", _ALL_SCOPES)
    size = ctypes.c_size_t(len(attributes))
    rules = _check(_libc.syscall(_CREATE_RULESET, attributes, size, 0), "landlock_create_ruleset")
    for fd in files:
        _allow(rules, fd, _READ_FILE)
    # QEMU opens this file to find out which kinds of locks the kernel has.
    null = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)
    _allow(rules, null, _READ_FILE | _WRITE_FILE)
    os.close(null)
    for path in programs:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        is_directory = os.path.isdir(path)  # noqa: PTH112  pathlib takes long to load
        _allow(rules, fd, _EXECUTE | _READ_FILE | (_READ_DIR if is_directory else 0))
        os.close(fd)
    _check(_libc.syscall(_RESTRICT_SELF, rules, 0), "landlock_restrict_self")
    os.close(rules)


def _allow(rules: int, fd: int, rights: int) -> None:
    """Add a rule that permits ``rights`` on an open file, or on all files below a directory."""
    rule = struct.pack("=Qi", rights, fd)
    _check(_libc.syscall(_ADD_RULE, rules, _RULE_PATH_BENEATH, rule, 0), "landlock_add_rule")


def _main(text: str) -> None:
    """Give up rights, and replace this process by the program; see `launch_command`.

    Raises:
        OSError: The kernel refused, or there is no such program.
    """
    order = json.loads(text)
    program = order["program"]
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != order["parent"]:
        return  # the parent ended before prctl, so no signal would come
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_MESSAGE_BYTES, _MAX_MESSAGE_BYTES))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _raise_descriptor_limit()
    given = (order["listener"], *order["files"], *order["named"])
    listener, *opened = [
        fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_TEMPORARY_DESCRIPTOR) for fd in given
    ]
    for fd in given:
        os.set_inheritable(fd, False)  # noqa: FBT003  those that closerange leaves open
    os.closerange(3, _FIRST_TEMPORARY_DESCRIPTOR)
    files = opened[: len(order["files"])]
    os.dup2(listener, 3)
    for number, fd in enumerate(files, FIRST_FILE_DESCRIPTOR):
        os.dup2(fd, number)
    version = landlock_version()
    if version:
        # A program in a prefix of its own has its libraries in the same prefix.
        prefix = os.path.dirname(os.path.dirname(program[0]))  # noqa: PTH120  as above
        own = [program[0], *(f"{prefix}/{name}" for name in _OWN_DIRECTORIES)]
        _restrict(version, opened, [*_SYSTEM_PATHS, *own])
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    variables = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    os.execve(program[0], program, variables)  # noqa: S606  no shell is wanted


if __name__ == "__main__":
    try:
        _main(sys.argv[1])
    except OSError as error:
        sys.exit(f"{error.strerror}")
