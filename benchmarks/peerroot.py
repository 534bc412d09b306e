"""A second QEMU, from the root directory of another Debian.

Its qemu-storage-daemon is started with that directory's dynamic loader and libraries.  So it
is an ordinary process of this system: it finds the images under the same paths as the other
systems do, and mounts where fio can see the mount.  In a chroot the paths would differ, and a
mount in the mount namespace of a container would be invisible outside.  Nothing is mounted
into the directory, and it need not be bootable: the kernel, /dev/fuse and fusermount3 are
those of this system.  Such a directory is made with

    debootstrap --variant=minbase --include=qemu-utils trixie DIRECTORY
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from benchmarks.commands import BenchmarkError

if TYPE_CHECKING:
    from pathlib import Path

DAEMON: Final = "usr/bin/qemu-storage-daemon"
_LOADERS: Final = ("usr/lib/*/ld-linux-*.so.?", "lib/*/ld-linux-*.so.?")
"""Where Debian keeps the loader, beside the C library; /lib64 may have an absolute link."""


def storage_daemon(root: Path) -> list[str]:
    """Return the beginning of the command that runs the qemu-storage-daemon of a directory.

    Raises:
        BenchmarkError: The directory does not contain the program or its loader.
    """
    root = root.resolve()
    program = root / DAEMON
    loaders = [path for pattern in _LOADERS for path in sorted(root.glob(pattern))]
    for path, found in ((program, program.exists()), (root / _LOADERS[0], bool(loaders))):
        if not found:
            msg = f"--peer-root {root}: found no {path.relative_to(root)}, expected a Debian root"
            raise BenchmarkError(msg)
    loader = loaders[0]
    # The cache of the loader is left out, because it lists the libraries of this system.
    return [
        str(loader),
        *("--inhibit-cache", "--library-path", str(loader.parent)),
        *("--argv0", "qemu-storage-daemon", str(program)),
    ]
