"""The system calls of Landlock, by which a process gives up access to files and to TCP.

A *ruleset* lists the access that stays permitted.  A thread that restricts itself by a ruleset, and
every thread and process that it starts later, have no other access.

`qedfuse.foreign.sandbox` imports this module in a script that runs without site packages.  So this
module imports only a few modules of the standard library.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct

_CREATE_RULESET = 444
_ADD_RULE = 445
_RESTRICT_SELF = 446
"""Numbers of the system calls; they differ on some architectures, for example Alpha and MIPS."""

_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1
_RULE_NET_PORT = 2

EXECUTE, WRITE_FILE, READ_FILE, READ_DIRECTORY = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIRECTORY, REMOVE_FILE = 1 << 4, 1 << 5
MAKE_DIRECTORY, MAKE_REGULAR = 1 << 7, 1 << 8
RENAME_BETWEEN_DIRECTORIES, TRUNCATE = 1 << 13, 1 << 14
"""Rights on files.  RENAME_BETWEEN_DIRECTORIES exists since version 2, TRUNCATE since version 3."""
CHANGE_FILES = READ_FILE | READ_DIRECTORY | WRITE_FILE | TRUNCATE | MAKE_REGULAR | REMOVE_FILE
"""Rights on a directory whose files a program makes, changes and removes."""
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
"""The rights that a file can have; the others belong to directories."""
_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Number of rights on files by version of Landlock; for later versions the last number is used."""

NETWORK_VERSION = 4
"""The first version that can forbid TCP."""
_BIND_TCP, _CONNECT_TCP = 1 << 0, 1 << 1
_SCOPE_VERSION = 6
"""The first version that can forbid signals and abstract sockets across a sandbox's border."""
SCOPE_ABSTRACT_SOCKETS, SCOPE_SIGNALS = 1 << 0, 1 << 1

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """Return the version of the kernel's Landlock ABI; 0 if Landlock is missing or switched off."""
    size = ctypes.c_size_t(0)
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, size, _VERSION_FLAG)))


def check_result(result: int, action: str) -> int:
    """Return the result of a call of the C library; raise OSError if the call has failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{action}: {os.strerror(number)}")
    return result


class Ruleset:
    """The rights that stay permitted.  The kernel refuses all others that its version knows.

    Attributes:
        fd: The descriptor of the ruleset.
        version: The kernel's version of Landlock, which is at least 1.
    """

    def __init__(self, version: int, scopes: int = SCOPE_ABSTRACT_SOCKETS | SCOPE_SIGNALS) -> None:
        """Make a ruleset that permits no access to files, and no TCP if the kernel can forbid TCP.

        Args:
            version: The kernel's version of Landlock.
            scopes: What the sandbox forbids towards processes outside of it, if the kernel can:
                `SCOPE_SIGNALS`, `SCOPE_ABSTRACT_SOCKETS` or both.

        Raises:
            OSError: The kernel refused.
        """
        self.version = version
        last = max(_RIGHTS_BY_VERSION.values())
        self._handled = (1 << _RIGHTS_BY_VERSION.get(version, last)) - 1
        attributes = struct.pack("=Q", self._handled)
        if version >= NETWORK_VERSION:
            attributes += struct.pack("=Q", _BIND_TCP | _CONNECT_TCP)
        if version >= _SCOPE_VERSION:
            attributes += struct.pack("=Q", scopes)
        size = ctypes.c_size_t(len(attributes))
        self.fd = check_result(
            _libc.syscall(_CREATE_RULESET, attributes, size, 0), "landlock_create_ruleset"
        )

    def allow(self, fd: int, rights: int) -> None:
        """Permit ``rights`` on an open file, or on everything below an open directory.

        Rights that the kernel's version does not know are left out.

        Raises:
            OSError: The kernel refused, for example to give a file a right of directories.
        """
        rule = struct.pack("=Qi", rights & self._handled, fd)
        check_result(
            _libc.syscall(_ADD_RULE, self.fd, _RULE_PATH_BENEATH, rule, 0), "landlock_add_rule"
        )

    def try_allow_path(self, path: str, rights: int) -> bool:
        """Permit ``rights`` on what a path leads to now; return False if it cannot be opened.

        For a file, the rights that only a directory can have are left out.

        Raises:
            OSError: The kernel refused the rule, for example because none of ``rights`` is left.
        """
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
            self.allow(fd, rights if is_directory else rights & _FILE_RIGHTS)
        finally:
            os.close(fd)
        return True

    def allow_connect(self, port: int) -> None:
        """Permit connections to a TCP port of any host; do nothing if TCP cannot be forbidden.

        Raises:
            OSError: The kernel refused.
        """
        if self.version < NETWORK_VERSION:
            return
        rule = struct.pack("=QQ", _CONNECT_TCP, port)
        check_result(
            _libc.syscall(_ADD_RULE, self.fd, _RULE_NET_PORT, rule, 0), "landlock_add_rule"
        )

    def restrict_self(self) -> None:
        """Restrict the calling thread, which must be unable to gain privileges (no_new_privs).

        Raises:
            OSError: The kernel refused.
        """
        check_result(_libc.syscall(_RESTRICT_SELF, self.fd, 0), "landlock_restrict_self")

    def close(self) -> None:
        """Close the descriptor; a restriction stays in force."""
        os.close(self.fd)
