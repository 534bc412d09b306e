"""The files that a server in a sandbox may open; the image files of its disks are open already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qedfuse.util.landlock import (
    CHANGE_FILES,
    MAKE_DIRECTORY,
    READ_DIRECTORY,
    READ_FILE,
    REMOVE_DIRECTORY,
    RENAME_BETWEEN_DIRECTORIES,
    TRUNCATE,
    WRITE_FILE,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

READ: Final = READ_FILE | READ_DIRECTORY
CHANGE_TREE: Final = CHANGE_FILES | MAKE_DIRECTORY | REMOVE_DIRECTORY | RENAME_BETWEEN_DIRECTORIES
"""Rights on a directory of files and directories that the server makes, changes and removes."""
SERVE: Final = READ | WRITE_FILE | TRUNCATE
"""Rights on the mount itself.  The server opens it to have cached pages written back
(`qedfuse.mount.system.unmount.sync_mount`), and its files to correct their sizes
(`qedfuse.mount.fuse.sizefixup`)."""
SERVE_FILE: Final = SERVE & ~READ_DIRECTORY
"""Rights on the mount itself if the mountpoint is a file."""

_SYSTEM_FILES: Final = (
    *(("/dev/null", READ_FILE | WRITE_FILE), ("/dev/urandom", READ_FILE)),
    # Landlock keeps this process from inspecting processes outside of the sandbox, so the right to
    # read /proc gives no access to their memory, environment and files.
    *(("/proc", READ), ("/sys/fs/cgroup", READ), ("/sys/devices/system/cpu", READ)),
    # Libraries that the C library loads when they are needed.
    *((path, READ) for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib")),
    *((path, READ) for path in ("/nix/store", "/gnu/store")),
    *((path, READ) for path in ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")),
)
_RESOLVER_FILES: Final = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf"),
    *("/etc/services", "/etc/protocols", "/etc/networks"),
    *("/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf", "/run/connman"),
)
"""What getaddrinfo(3) reads.  If /etc/resolv.conf is a link into a directory below /run, the file
there is replaced when the network changes, so the whole directory may be read."""
_CERTIFICATES: Final = (
    *("/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/usr/share/ca-certificates"),
    *("/usr/local/share/ca-certificates", "/usr/share/ssl", "/etc/crypto-policies"),
)
_MAX_LINKS: Final = 40
"""Maximum number of symbolic links that the kernel follows in a path (path_resolution(7))."""
_CERTIFICATE_VARIABLES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def system_files() -> Iterator[tuple[str, int]]:
    """Yield what every server may open: a path, and the rights on it and on all files below it.

    The modules of Python and qedfuse are included, because some are imported after the sandbox is
    entered, for example when the mount ends.
    """
    yield from _SYSTEM_FILES
    package = __file__.removesuffix("/mount/sandbox/allowedfiles.py")
    for path in (os.path.dirname(os.__file__), package, *_site_packages()):  # noqa: PTH120  str paths
        yield path, READ


def _site_packages() -> list[str]:
    """Return the directories of ``sys.path`` that have the usual name for installed packages."""
    import sys  # noqa: PLC0415  only here

    return [path for path in sys.path if path.endswith(("/site-packages", "/dist-packages"))]


def network_files(variables: Iterable[tuple[str, str]]) -> Iterator[tuple[str, int]]:
    """Yield what a server that reads remote files may open in addition to `system_files`.

    Args:
        variables: The variables of the environment and of a file with credentials.
    """
    for path in (*_RESOLVER_FILES, *_CERTIFICATES):
        yield path, READ
    for name, value in variables:
        if name in _CERTIFICATE_VARIABLES:
            for path in value.split(":"):
                yield path, READ


def key_directories(files: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield the directories of files with keys or tokens, and the rights on them.

    Another program replaces such a file before the key expires, and Landlock would not permit the
    new file.  So the whole directory may be read.  If the file is a symbolic link, the link or its
    target may be replaced, so the directories of both are included, and of each link between.
    """
    for path in files:
        for found in _linked_paths(str(Path(path).absolute())):
            yield os.path.dirname(found), READ_FILE  # noqa: PTH120  str paths


def _linked_paths(path: str) -> Iterator[str]:
    """Yield an absolute path, and if it is a symbolic link, each further path to which it leads.

    A path that is relative to a link is not normalized, because ``..`` after a directory that is a
    link itself does not lead back.
    """
    for _ in range(_MAX_LINKS):
        yield path
        try:
            target = os.readlink(path)  # noqa: PTH115  str paths
        except OSError:  # no link, or missing
            return
        path = os.path.join(os.path.dirname(path), target)  # noqa: PTH118, PTH120  str paths
