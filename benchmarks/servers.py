"""A server that serves the disks of some images until it is stopped."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.commands import BenchmarkError, run
from benchmarks.systems import PEERS, service
from qedfuse.mount.system.mounttable import find_mount
from qedfuse.mount.system.readahead import DEFAULT_READAHEAD_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.systems import Programs, System

START_SECONDS: Final = 20.0
STOP_SECONDS: Final = 60.0


class Server:
    """Serves the disks of some images until `stop`.

    Attributes:
        system: The system.
        images: The images.
        disks: Their disks, in the same order.
        pid: The process.
    """

    def __init__(
        self,
        programs: Programs,
        system: System,
        images: Sequence[Path],
        directory: Path,
        *,
        threads: bool = False,
    ) -> None:
        """Start the server; ``threads`` makes the baseline use many threads instead of one.

        Raises:
            BenchmarkError: The server does not start.
        """
        self.system: Final = system
        self.images: Final = images
        self._programs = programs
        self._service: Final = service(programs, system, images, directory, threads=threads)
        self.disks: Final = self._service.disks
        for mountpoint in self._service.mountpoints:
            if self._service.mounts_files:
                mountpoint.touch()
            else:
                mountpoint.mkdir()
        self._log = directory / f"{system}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._service.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._service.variables},
                start_new_session=True,
            )
        self.pid: Final = self._process.pid
        try:
            self._wait_until_there(directory.stat().st_dev)
        except BaseException:
            self.kill()
            raise

    def _wait_until_there(self, host: int) -> None:
        """Return when all disks can be used; ``host`` is the device number of the directory.

        Raises:
            BenchmarkError: The server has ended, or has not mounted in time.
        """
        end = time.monotonic() + START_SECONDS
        missing = list(self._service.mountpoints)
        while time.monotonic() < end:
            self.check()
            # Read from the mount table, because accessing the file system may block.
            while missing and (device := _mounted_at(missing[0])) not in {None, host}:
                assert device is not None
                if self.system == "baseline":
                    _raise_read_ahead(device)
                missing.pop(0)
            if not missing:
                return
            time.sleep(0.02)
        msg = f"{self.system}: found no mount after {START_SECONDS:.0f} s: {self._last_words()}"
        raise BenchmarkError(msg)

    def check(self) -> None:
        """Check that the server still runs.

        Raises:
            BenchmarkError: The server has ended; the message has the last line of its output.
        """
        if self._process.poll() is not None:
            msg = f"{self.system}: the server ended by itself: {self._last_words()}"
            raise BenchmarkError(msg)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"

    def stop(self) -> None:
        """Unmount and wait for the server's end, so that the image holds everything.

        Raises:
            BenchmarkError: The server failed, or had to be killed.
        """
        try:
            self.check()
            mountpoint = str(self._service.mountpoints[0])
            if self.system in PEERS:
                self._process.terminate()
            elif self.system == "baseline":
                run("fusermount3", "-u", mountpoint, seconds=STOP_SECONDS)
            else:
                run(self._programs.qedfuse, "umount", mountpoint, seconds=STOP_SECONDS)
            try:
                code = self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                msg = f"{self.system}: still running {STOP_SECONDS:.0f} s after the unmount"
                raise BenchmarkError(msg) from None
            if code:
                msg = f"{self.system}: exit code {code}: {self._last_words()}"
                raise BenchmarkError(msg)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the server in any state, and remove its mountpoints."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for mountpoint in self._service.mountpoints:
            with suppress(BenchmarkError):
                if _mounted_at(mountpoint) is not None:
                    run("fusermount3", "-u", "-z", str(mountpoint), seconds=10)
            with suppress(OSError):
                if self._service.mounts_files:
                    mountpoint.unlink()
                else:
                    mountpoint.rmdir()


def _mounted_at(path: Path) -> int | None:
    """Return the device number (st_dev) of the mount at ``path``, or None if there is none."""
    entry = find_mount(str(path))
    if entry is None:
        return None
    major, minor = entry.device.split(":")
    return os.makedev(int(major), int(minor))


def _raise_read_ahead(device: int) -> None:
    """Set the kernel's read-ahead to the same value as qedfuse, if that is permitted."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        Path(f"/sys/class/bdi/{number}/read_ahead_kb").write_text(
            str(DEFAULT_READAHEAD_BYTES >> 10), encoding="ascii"
        )
