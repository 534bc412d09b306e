"""A FUSE file system whose file stops answering when a test says so: a host disk that hangs.

``python -m tests.support.stallingfs FILE MOUNTPOINT SECONDS KIND`` shows FILE in MOUNTPOINT.  The
kernel caches the attributes for SECONDS, and, if KIND is ``cached`` and not ``direct``, the pages.
After the line ``stall`` on standard input each read, write and fsync waits, and prints its name,
until the line ``release``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyfuse3
import trio

from tests.support.mounted import clean_up
from tests.support.programs import TREE, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE_INODE = pyfuse3.InodeT(2)


def _report(line: str) -> None:
    """Print a line for the test."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class _Stalling(pyfuse3.Operations):
    """Shows one file."""

    def __init__(self, path: Path, attr_timeout: float, *, is_cached: bool) -> None:
        super().__init__()
        self.attr_timeout = attr_timeout
        self.is_cached = is_cached
        self.fd = os.open(path, os.O_RDWR)
        self.name = os.fsencode(path.name)
        self.released = trio.Event()
        self.released.set()

    async def _pass(self, name: str) -> None:
        """Wait until the file answers."""
        if not self.released.is_set():
            _report(name)
            await self.released.wait()

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """Return the attributes of the file or of the directory."""
        del ctx
        found = os.fstat(self.fd)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = found.st_mode if inode == FILE_INODE else 0o040755
        entry.st_size = found.st_size if inode == FILE_INODE else 0
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.attr_timeout = self.attr_timeout
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find the file by its name."""
        if parent_inode != pyfuse3.ROOT_INODE or name != self.name:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(FILE_INODE, ctx)

    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Change the length of the file."""
        del fh
        if fields.update_size:
            os.ftruncate(self.fd, attr.st_size)
        return await self.getattr(inode, ctx)

    async def open(
        self, inode: pyfuse3.InodeT, flags: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        """Open the file; unless it is cached, no request is answered from the page cache."""
        del flags, ctx
        return pyfuse3.FileInfo(
            fh=pyfuse3.FileHandleT(inode), direct_io=not self.is_cached, keep_cache=self.is_cached
        )

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Read."""
        del fh
        await self._pass("read")
        return os.pread(self.fd, size, off)

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Write."""
        del fh
        await self._pass("write")
        return os.pwrite(self.fd, buf, off)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:  # noqa: FBT001
        """Do nothing, which is all that a test needs."""
        del fh, datasync
        await self._pass("fsync")

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return fixed numbers."""
        del ctx
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = 4096
        found.f_blocks = found.f_bfree = found.f_bavail = 1 << 20
        found.f_namemax = 255
        return found


async def _serve(path: Path, mountpoint: Path, attr_timeout: float, *, is_cached: bool) -> None:
    """Mount, and obey standard input until it ends."""
    operations = _Stalling(path, attr_timeout, is_cached=is_cached)
    pyfuse3.init(operations, os.fspath(mountpoint), {"fsname=stallingfs"})
    _report("mounted")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: pyfuse3.main(max_tasks=1000))
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            if line == "stall\n":
                operations.released = trio.Event()
                _report("stalled")
            else:
                operations.released.set()
        operations.released.set()
        pyfuse3.terminate()
    pyfuse3.close(unmount=False)


class StallingFile:
    """A file on a mounted file system that can be made to hang.

    Attributes:
        path: The file as programs see it.
    """

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        """Wrap a running file system."""
        self._process = process
        self.path = path

    def _expect(self, line: str) -> None:
        assert self._process.stdout is not None
        found = self._process.stdout.readline()
        assert found == f"{line}\n", found

    def _order(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def stall(self) -> None:
        """Let each request wait from now on."""
        self._order("stall")
        self._expect("stalled")

    def wait_for(self, *names: str) -> None:
        """Return when requests of these names have begun to wait, in this order."""
        for name in names:
            self._expect(name)

    def release(self) -> None:
        """Answer everything."""
        self._order("release")

    def kill(self) -> None:
        """End the server without an unmount, so that each call for the file fails with ENOTCONN."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def stalling(
    path: Path, mountpoint: Path, *, attr_timeout: float = 300.0, is_cached: bool = False
) -> Iterator[StallingFile]:
    """Show a file at a mountpoint, which is made, for the block.

    Args:
        path: The file.
        mountpoint: The directory to make.
        attr_timeout: For how many seconds the kernel may cache the attributes of the file.
        is_cached: Whether the kernel keeps the pages of the file in its page cache.
    """
    mountpoint.mkdir()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.support.stallingfs", path, mountpoint),
            *(str(attr_timeout), "cached" if is_cached else "direct"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=TREE,
    )
    file = StallingFile(process, mountpoint / path.name)
    try:
        file.wait_for("mounted")
        yield file
    finally:
        with contextlib.suppress(BrokenPipeError):
            file.release()
        clean_up(mountpoint)
        process.kill()
        process.communicate()


if __name__ == "__main__":
    _, file, directory, seconds, kind = sys.argv
    trio.run(
        partial(_serve, Path(file), Path(directory), float(seconds), is_cached=kind == "cached")
    )
