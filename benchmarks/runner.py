"""A runner: sets up a cell for one system, measures it repeatedly, and verifies the disk."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import loads
from benchmarks.cells import Cell, Fio
from benchmarks.commands import BenchmarkError, WrongDataError
from benchmarks.ext4 import FileSystem, make_tree
from benchmarks.images import CONSUMED_STAGES, Images
from benchmarks.pagecache import cache_file, evict_file, sync_file
from benchmarks.servers import Programs, Server, System


@dataclass(frozen=True)
class Environment:
    """What all runners share.

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
    """Runs a cell on a system; `finish` or `abort` must be called in the end.

    Attributes:
        system: The system.
        wrong: A description of wrong content, once the disk has been verified.
    """

    def __init__(self, system: System, cell: Cell, environment: Environment) -> None:
        self.system: Final = system
        self._cell = cell
        self._environment = environment
        # A file system that is kept over all rounds needs no new image each time.
        self._fresh = cell.stage in CONSUMED_STAGES and (not cell.loop or cell.load == "copy")
        size = environment.images.disk_bytes(cell.stage)
        # A file on a file system leaves space for metadata and for the tree.
        self._size = size // 4 if cell.loop else size
        self._server: Server | None = None
        self._file_system: FileSystem | None = None
        self._writes = 0
        self._warmed = False
        self.wrong = ""

    def measure(self, *, last: bool) -> float:
        """Measure once and return the figure; verify the disk after the ``last`` time.

        Raises:
            BenchmarkError: It failed.
        """
        if self._server is None:
            self._start()
        server = self._server
        assert server is not None
        self._arrange_caches(server)
        result = self._load(server)
        self._writes = result.writes if self._fresh else max(self._writes, result.writes)
        if last:
            try:
                self._check(server)
            except WrongDataError as error:
                self.wrong = str(error)
            except BenchmarkError as error:
                if self._file_system is None:
                    raise
                # The file system cannot be read: the disk below it has wrong content.
                self.wrong = str(error)
        if self._fresh:
            self.finish()
        sync_file(server.image)
        return result.figure

    def finish(self) -> None:
        """Unmount, so that the image holds everything.

        Raises:
            BenchmarkError: That failed; nothing is left mounted nevertheless.
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
            # First, because processes that use the disk wait for the server.
            self._server.kill()
        if self._file_system is not None:
            self._file_system.abandon()
        self._server = self._file_system = None

    def _start(self) -> None:
        """Start the server, and prepare the file system if the cell has one."""
        environment, cell = self._environment, self._cell
        image = environment.images.make(cell.stage, self.system)
        if cell.cold != "host":
            # Before the server reads the files, after which the kernel would read ahead.
            for file in environment.images.files(cell.stage, image):
                cache_file(file)
        self._server = Server(
            environment.programs, self.system, image, environment.directory, threads=cell.parallel
        )
        if cell.loop:
            self._file_system = FileSystem(
                self._server.disk,
                environment.directory / f"{self.system}.ext4",
                direct=cell.loop == "direct",
                read_only=cell.load == "tar",
            )
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
            loads.read("drop-cache", server.disk)
            self._file_system.attach()
        if cell.cold:
            loads.read("drop-cache", server.disk)
        for file in self._environment.images.files(cell.stage, server.image):
            if cell.cold == "host":
                evict_file(file)
            else:
                cache_file(file)
        if cell.cold == "host":
            with suppress(PermissionError):  # the files' data has been evicted already
                Path("/proc/sys/vm/drop_caches").write_text("1", encoding="ascii")
        if cell.warm and not self._warmed:
            everything = Fio("read", 1 << 20, direct=False, max_bytes=1 << 40)
            loads.measure_fio(everything, server.disk, 60, "MiB/s", self._size)
            self._warmed = True

    def _load(self, server: Server) -> loads.Result:
        """Run the load and return its result."""
        cell, environment = self._cell, self._environment
        if cell.load == "walk":
            return loads.Result(loads.read("walk", server.disk, str(environment.seconds)))
        if isinstance(cell.load, Fio):
            file = server.disk if self._file_system is None else self._file_system.root / "file"
            return loads.measure_fio(cell.load, file, environment.seconds, cell.unit, self._size)
        assert self._file_system is not None
        if cell.load == "copy":
            return loads.copy_and_sync(make_tree(environment.directory), self._file_system.root)
        return loads.read_with_tar(self._file_system.root / "tree")

    def _check(self, server: Server) -> None:
        """Verify the whole disk, or the files on it.

        Raises:
            WrongDataError: The content is wrong.
            BenchmarkError: It cannot be read.
        """
        cell, environment = self._cell, self._environment
        if self._file_system is not None:
            if isinstance(cell.load, Fio):
                loads.verified_writes(self._file_system.root / "file")
                return
            # The comparison must read the image, not a cache.
            self._file_system.detach()
            loads.read("drop-cache", server.disk)
            self._file_system.attach()
            loads.same_trees(make_tree(environment.directory), self._file_system.root / "tree")
            return
        expected = environment.images.expected(cell.stage)
        block = cell.load.block if isinstance(cell.load, Fio) and cell.load.writes else 0
        found = loads.read("check", server.disk, str(expected or "-"), str(block))
        wanted = min(self._writes, self._size // block) if block else 0
        if found < wanted:
            msg = f"{server.disk}: found {found:.0f} blocks as written, expected {wanted}"
            raise WrongDataError(msg)
