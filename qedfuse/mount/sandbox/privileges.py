"""Giving up privileges, in all threads of the process: files, TCP and capabilities."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
from typing import TYPE_CHECKING, Final

from qedfuse.util.extensions import try_import_extension
from qedfuse.util.landlock import check_result

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.util.landlock import Ruleset

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER = 1, 2, 3
"""Numbers of capabilities: open any file, read any file, change the permissions of any file."""

_NAMES: Final = {
    CAP_DAC_OVERRIDE: "dac_override",
    CAP_DAC_READ_SEARCH: "dac_read_search",
    CAP_FOWNER: "fowner",
}

_PR_SET_DUMPABLE: Final = 4

SIGNAL: Final = signal.SIGRTMAX - 5
"""The signal that makes a thread give up its rights; ``_iopool.c`` has the same number."""

_INTERFACE: Final = 1
"""The interface number of the extension ``_threads``."""

_libc = ctypes.CDLL(None, use_errno=True)


def make_undumpable() -> None:
    """Forbid core dumps, and inspection of the process by other processes of the user.

    Raises:
        OSError: The kernel refused.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    check_result(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


def thread_restrictor() -> Callable[[Ruleset | None, int], None] | None:
    """Return a function that restricts all threads by a ruleset, and makes them drop capabilities.

    Returns None if the extension, which is optional, cannot be used.

    The first argument of the function is the ruleset, which says what stays permitted; None for no
    ruleset.  The second argument is the set of the capabilities to keep, with bit n for capability
    n.  The function raises OSError if the kernel refuses, perhaps after it has restricted some
    threads.

    The caller must call `thread_restrictor` before the mount exists, because it loads an extension,
    and no module may be loaded while the mount is served.
    """
    extension = try_import_extension("qedfuse.mount.sandbox._threads", _INTERFACE)
    if extension is None:
        return None

    def restrict(rules: Ruleset | None, capabilities: int) -> None:
        extension.restrict_threads(-1 if rules is None else rules.fd, capabilities, SIGNAL)

    return restrict


def may_have_capabilities() -> bool:
    """Return whether the process runs as root, and so has capabilities to drop."""
    return os.geteuid() == 0


def removing_needs_override(directory: int) -> bool:
    """Return whether removing a file from an open directory can need CAP_DAC_OVERRIDE.

    It can if the permission bits forbid the owner to write to the directory or to search it.  It
    can in every directory of another user, because the permission bits do not show what an access
    control list forbids to users other than the owner.
    """
    needed = stat.S_IWUSR | stat.S_IXUSR
    try:
        status = os.fstat(directory)
    except OSError:  # nothing can be removed
        return False
    return status.st_uid != os.geteuid() or status.st_mode & needed != needed


def capability_names(capabilities: int) -> list[str]:
    """Return the names of the capabilities in a set; leave out those that are not in `_NAMES`."""
    return [name for number, name in _NAMES.items() if capabilities >> number & 1]
