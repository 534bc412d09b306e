"""A runner: sets up a cell for one system, measures it repeatedly, and verifies the disks."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from benchmarks import loads
from benchmarks.cells import Cell, Fio
from benchmarks.commands import BenchmarkError, WrongDataError
from benchmarks.cputime import cpu_time
from benchmarks.ext4 import FileSystem, make_tree
from benchmarks.images import CONSUMED_STAGES, Images
from benchmarks.pagecache import (
    ContinuousWriteBack,
    cache_file,
    drop_page_cache,
    evict_file,
    sync_file,
)
from benchmarks.servers import Server

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.cputime import CpuTime
    from benchmarks.systems import Programs, System


@dataclass(frozen=True)
class Environment:
    """The files and settings that all runners share.

    Attributes:
        directory: Where images and mountpoints are created.
        images: The images.
        programs: The programs that are measured.
        seconds: The length of a measurement.
    """

    directory: Path
    images: Images
    programs: Programs
    seconds: float


class Runner:
    """Runs a cell on a system; `finish` or `abort` must be called in the end."""

    def __init__(self, system: System, cell: Cell, environment: Environment) -> None:
        self._system: Final = system
        self._cell = cell
        self._environment = environment
        # A file system that is kept over all rounds needs no new image each time.
        consumed = cell.stage in CONSUMED_STAGES and (not cell.loop or cell.load == "copy")
        self._fresh = consumed or cell.pages == "clean"
        size = environment.images.disk_bytes(cell.stage)
        # A file on a file system leaves space for metadata and for the tree.
        self._size = size // 4 if cell.loop else size
        self._images: list[Path] = []
        self._server: Server | None = None
        self._file_system: FileSystem | None = None
        self._writes = [0] * cell.disks
        self._warmed = False

    def measure(self) -> tuple[loads.Result, CpuTime]:
        """Measure once; return the result and the CPU time that the server used for it.

        Raises:
            BenchmarkError: The measurement failed.
        """
        if self._server is None:
            self._make_images()
            self._start()
            if self._cell.loop:
                self._attach(make=True)
        server = self._server
        assert server is not None
        try:
            self._arrange_caches(server)
            with self._page_state(server):
                before = cpu_time(server.pid)
                result = self._load(server)
                used = cpu_time(server.pid).minus(before)
        except BenchmarkError:
            server.check()  # its end explains a failure of the load
            raise
        for number, writes in enumerate(result.writes):
            self._writes[number] = max(0 if self._fresh else self._writes[number], writes)
        if self._fresh:
            self.finish()
        else:
            self._sync(server)
        for image in self._images:
            sync_file(image)
        return result, used

    def verify(self) -> None:
        """Verify the disks after the last measurement; do nothing if there was none.

        Raises:
            WrongDataError: The content is wrong.
            BenchmarkError: A disk cannot be read.
        """
        if not self._images:
            return
        if self._server is None:
            self._start()
        server = self._server
        assert server is not None
        try:
            if self._cell.loop and self._file_system is None:
                self._attach(make=False)
            self._check(server)
        except WrongDataError:
            raise
        except BenchmarkError as error:
            if self._file_system is None:
                raise
            # The file system cannot be mounted or read: the disk has wrong content.
            raise WrongDataError(str(error)) from error

    def finish(self) -> None:
        """Unmount, so that the image holds everything.

        Raises:
            BenchmarkError: The unmount failed; nothing is left mounted nevertheless.
        """
        filesystem, self._file_system = self._file_system, None
        server, self._server = self._server, None
        try:
            if filesystem is not None:
                filesystem.detach()
        except BenchmarkError:
            if server is not None:
                server.kill()
            raise
        finally:
            if filesystem is not None:
                filesystem.abandon()
        if server is not None:
            server.stop()

    def abort(self) -> None:
        """Kill the server and unmount everything after a failure."""
        if self._server is not None:
            # The server is killed first, because processes that use the disk wait for it.
            self._server.kill()
        if self._file_system is not None:
            self._file_system.abandon()
        self._server = self._file_system = None

    def _make_images(self) -> None:
        """Create the images, unless earlier measurements have left them in the right state."""
        cell, images = self._cell, self._environment.images
        if cell.pages == "clean":
            self._images = [images.copy(cell.stage, self._system)]
            return
        self._images = [images.make(cell.stage, self._system, n) for n in range(cell.disks)]
        if cell.cold != "host":
            # The files get into the page cache before the server reads them, because the kernel
            # would read ahead of the server.  Pages of an earlier cell are evicted first: large
            # folios, which a cold sequential read leaves, would change the speed of writes.
            for image in self._images:
                for file in images.files(cell.stage, image):
                    evict_file(file)
                    cache_file(file)

    def _start(self) -> None:
        """Start the server."""
        environment = self._environment
        self._server = Server(
            environment.programs,
            self._system,
            self._images,
            environment.directory,
            threads=self._cell.parallel,
        )

    def _attach(self, *, make: bool) -> None:
        """Attach the file system on the disk; with ``make``, make and fill it first."""
        cell, environment = self._cell, self._environment
        assert self._server is not None
        self._file_system = FileSystem(
            self._server.disks[0],
            environment.directory / f"{self._system}.ext4",
            direct=cell.loop == "direct",
            read_only=cell.load == "tar",
        )
        if make:
            self._file_system.make()
            if cell.load == "tar":
                loads.copy_and_sync(make_tree(environment.directory), self._file_system.root)
            elif isinstance(cell.load, Fio):
                loads.lay_out(self._file_system.root / "file", self._size)
            self._file_system.detach()
        self._file_system.attach()

    def _arrange_caches(self, server: Server) -> None:
        """Fill or empty the page caches as the cell requires."""
        cell = self._cell
        if self._file_system is not None and cell.load == "tar":
            self._file_system.detach()
            loads.read("drop-cache", server.disks[0])
            self._file_system.attach()
        if cell.cold:
            for disk in server.disks:
                loads.read("drop-cache", disk)
        for image in server.images:
            for file in self._environment.images.files(cell.stage, image):
                if cell.cold == "host":
                    evict_file(file)
                else:
                    cache_file(file)
        if cell.cold == "host":
            with suppress(PermissionError):  # the files' data has been evicted already
                drop_page_cache()
        if cell.warm and not self._warmed:
            everything = Fio("read", 1 << 20, direct=False, max_bytes=self._size)
            loads.measure_fio([everything], server.disks, 60, "MiB/s", self._size)
            self._warmed = True

    def _page_state(self, server: Server) -> ContinuousWriteBack | nullcontext[None]:
        """Bring the image's pages into the state of the cell; return what keeps them in it."""
        cell = self._cell
        if cell.pages in {"dirty", "under write-back"}:
            self._writes[0] = max(self._writes[0], loads.fill_area(cell.fio[0], server.disks[0]))
        return (
            ContinuousWriteBack(server.images)
            if cell.pages == "under write-back"
            else nullcontext()
        )

    def _load(self, server: Server) -> loads.Result:
        """Run the load and return its result."""
        cell, environment = self._cell, self._environment
        if cell.fio:
            disks = server.disks
            if self._file_system is not None:
                disks = [self._file_system.root / "file"]
            return loads.measure_fio(cell.fio, disks, environment.seconds, cell.unit, self._size)
        if cell.load == "walk":
            return loads.walk(server.disks[0], environment.seconds)
        if cell.load == "cp":
            target = environment.directory / "copy"
            try:
                return loads.copy_disk(server.disks[0], target, self._size)
            finally:
                target.unlink(missing_ok=True)
        assert self._file_system is not None
        tree = make_tree(environment.directory)
        if cell.load == "copy":
            return loads.copy_and_sync(tree, self._file_system.root)
        return loads.read_with_tar(self._file_system.root / "tree", tree)

    def _sync(self, server: Server) -> None:
        """Write back what is dirty in the caches of the file system and of the mount.

        Otherwise the kernel would do so while another system is measured.
        """
        if self._file_system is not None:
            loads.sync_file_system(self._file_system.root)
        if self._file_system is not None or self._cell.writes:
            for disk in server.disks:
                loads.sync_disk(disk)

    def _check(self, server: Server) -> None:
        """Verify the whole disks, or the files on the file system.

        Raises:
            WrongDataError: The content is wrong.
            BenchmarkError: A disk or a file cannot be read.
        """
        cell, environment = self._cell, self._environment
        if self._file_system is not None:
            if isinstance(cell.load, Fio):
                loads.verified_writes(self._file_system.root / "file")
                return
            # The comparison must read the image, not a cache.
            self._file_system.detach()
            loads.read("drop-cache", server.disks[0])
            self._file_system.attach()
            loads.same_trees(make_tree(environment.directory), self._file_system.root / "tree")
            return
        for number, disk in enumerate(server.disks):
            expected = environment.images.expected(cell.stage, number)
            load = cell.fio[number] if cell.fio and cell.fio[number].writes else None
            block = load.block if load else 0
            found = loads.read("check", disk, str(expected or "-"), str(block))
            wanted = load.min_changed(self._writes[number], self._size) if load else 0
            if found < wanted:
                msg = f"{disk}: found {found:.0f} blocks as written, expected {wanted}"
                raise WrongDataError(msg)
