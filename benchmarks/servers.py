"""The systems that are measured, each serving one disk: qedfuse, QEMU and the baseline."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from benchmarks.commands import BenchmarkError, run
from qedfuse.mount.system.mounttable import find_mount

System: TypeAlias = Literal["qedfuse", "qemu", "baseline", "single"]
"""``single`` is qedfuse on a single image with the content of the chain."""

START_SECONDS: Final = 20.0
STOP_SECONDS: Final = 60.0
READ_AHEAD_KIB: Final = 1024


class Programs(NamedTuple):
    """The paths of the measured programs, except QEMU's, which are found on the PATH."""

    qedfuse: str
    baseline: str


class Server:
    """Serves one disk until `stop`; ``disk`` is its flat file.

    ``threads`` makes the baseline use many threads instead of one.
    """

    def __init__(
        self,
        programs: Programs,
        system: System,
        image: Path,
        directory: Path,
        *,
        threads: bool = False,
    ) -> None:
        self.system: Final = system
        self.image: Final = image
        self._programs = programs
        self._mountpoint: Final = directory / f"{system}.mnt"
        environment = dict(os.environ)
        if system == "qemu":
            self._mountpoint.touch()
            self.disk = self._mountpoint
            command = _qemu_command(image, self._mountpoint)
        elif system == "baseline":
            self._mountpoint.mkdir()
            self.disk = self._mountpoint / "disk.raw"
            command = [programs.baseline, str(image), str(self._mountpoint)]
            environment["THREADS"] = "many" if threads else "one"
        else:
            self._mountpoint.mkdir()
            self.disk = self._mountpoint / f"{image.stem}.raw"
            command = [programs.qedfuse, str(image), str(self._mountpoint), "-f"]
        self._log = directory / f"{system}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        try:
            self._wait_until_there(directory.stat().st_dev)
        except BaseException:
            self.kill()
            raise

    def _wait_until_there(self, host: int) -> None:
        """Return when the disk can be used; ``host`` is the device number of the directory.

        Raises:
            BenchmarkError: The server has ended, or has not mounted in time.
        """
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                msg = f"{self.system}: the server ended by itself: {self._last_words()}"
                raise BenchmarkError(msg)
            # Read from the mount table, because accessing the file system may block.
            device = _mounted_at(self._mountpoint)
            if device is not None and device != host:
                if self.system == "baseline":
                    _raise_read_ahead(device)
                return
            time.sleep(0.02)
        msg = f"{self.system}: found no mount after {START_SECONDS:.0f} s: {self._last_words()}"
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
            if self._process.poll() is not None:
                msg = f"{self.system}: the server ended by itself: {self._last_words()}"
                raise BenchmarkError(msg)
            if self.system == "qemu":
                self._process.terminate()
            elif self.system == "baseline":
                run("fusermount3", "-u", str(self._mountpoint), seconds=STOP_SECONDS)
            else:
                run(self._programs.qedfuse, "umount", str(self._mountpoint), seconds=STOP_SECONDS)
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
        """Kill the server in any state, and remove its mountpoint."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        with suppress(BenchmarkError):
            if _mounted_at(self._mountpoint) is not None:
                run("fusermount3", "-u", "-z", str(self._mountpoint), seconds=10)
        with suppress(OSError):
            if self.system == "qemu":
                self._mountpoint.unlink()
            else:
                self._mountpoint.rmdir()


def _qemu_command(image: Path, mountpoint: Path) -> list[str]:
    """Return QEMU's command line, with its defaults for whatever concerns speed."""
    file = {"driver": "file", "filename": str(image)}
    node = {"driver": "qed", "node-name": "disk", "file": file}
    export = {
        "type": "fuse",
        "id": "export",
        "node-name": "disk",
        "mountpoint": str(mountpoint),
        "writable": True,
        "growable": False,
    }
    return [
        "qemu-storage-daemon",
        *("--blockdev", json.dumps(node)),
        *("--export", json.dumps(export)),
    ]


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
            str(READ_AHEAD_KIB), encoding="ascii"
        )
