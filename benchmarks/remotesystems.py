"""The programs that show an object of a server as a file, each started anew with empty caches."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Self, TypeAlias

from benchmarks.commands import BenchmarkError
from qedfuse.mount.system.mounttable import find_mount

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

System: TypeAlias = Literal["qedfuse", "local", "nbdkit", "rclone"]
"""``local`` is qedfuse with the image on the local disk."""

TITLES: Final[Mapping[System, str]] = {
    "qedfuse": "qedfuse",
    "local": "qedfuse, local file",
    "nbdkit": "nbdkit curl, nbdfuse",
    "rclone": "rclone mount",
}
PROGRAMS: Final[Mapping[System, str]] = {
    "nbdkit": "nbdfuse",
    "rclone": "rclone",
}
"""The program that a peer needs."""

KEY: Final = "golden"
"""The name of the objects, apart from their suffix."""
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 5.0


class Source(NamedTuple):
    """Where an image is.

    Attributes:
        url: The URL of the directory or bucket, without a slash at its end.
        image: The image on the local disk, for ``local``.
        variables: What clients need to read the URL.
    """

    url: str
    image: Path
    variables: Mapping[str, str]

    @property
    def is_store(self) -> bool:
        """Return whether the objects are in a bucket."""
        return self.url.startswith("s3://")


class Started(NamedTuple):
    """How a system is started.

    Attributes:
        command: The command line of a process that stays in the foreground.
        disk: The flat file.
        mountpoint: Where the system mounts.
        variables: Further environment variables.
    """

    command: Sequence[str]
    disk: Path
    mountpoint: Path
    variables: Mapping[str, str]


def how_to_start(system: System, source: Source, directory: Path, qedfuse: str) -> Started:
    """Return how to start a system, with its caches in ``directory``."""
    mountpoint = directory / "mnt"
    variables = {**source.variables, "XDG_CACHE_HOME": str(directory / "cache")}
    if system in ("qedfuse", "local"):
        image = f"{source.url}/{KEY}.qed" if system == "qedfuse" else str(source.image)
        command = [qedfuse, "-r", "-f", image, str(mountpoint)]
        return Started(command, mountpoint / f"{KEY}.raw", mountpoint, variables)
    if system == "nbdkit":
        disk = mountpoint / f"{KEY}.raw"
        server = ["nbdkit", "--exit-with-parent", "-r", "curl", f"{source.url}/{KEY}.raw"]
        return Started(["nbdfuse", "-r", str(disk), "[", *server, "]"], disk, mountpoint, variables)
    remote = f":s3:{source.url.removeprefix('s3://')}" if source.is_store else ":http:"
    command = ["rclone", "mount", remote, str(mountpoint), "--read-only"]
    command += ["--vfs-cache-mode", "full", "--cache-dir", str(directory / "cache")]
    variables |= {"RCLONE_CONFIG": "/dev/null", "RCLONE_HTTP_URL": source.url}
    if source.is_store:
        variables |= {
            "RCLONE_S3_PROVIDER": "Other",
            "RCLONE_S3_ENDPOINT": source.variables["AWS_ENDPOINT_URL"],
            "RCLONE_S3_ACCESS_KEY_ID": source.variables["AWS_ACCESS_KEY_ID"],
            "RCLONE_S3_SECRET_ACCESS_KEY": source.variables["AWS_SECRET_ACCESS_KEY"],
        }
    return Started(command, mountpoint / f"{KEY}.raw", mountpoint, variables)


def _environment(started: Started) -> dict[str, str]:
    """Return the environment of a process."""
    # rclone refuses to start with this variable, which only matters for TLS.
    inherited = {name: value for name, value in os.environ.items() if name != "AWS_CA_BUNDLE"}
    return {**inherited, **started.variables}


class Mount:
    """A system that has mounted, as a context manager.

    Attributes:
        disk: The flat file.
        pid: The process.
        start_seconds: Time from the start of the process until the mount was there.
    """

    def __init__(self, started: Started, log: Path) -> None:
        """Prepare a mount; the output of the process goes to ``log``."""
        self._started = started
        self._log = log
        self.disk: Final = started.disk
        self.pid = 0
        self.start_seconds = 0.0

    def __enter__(self) -> Self:
        """Mount.

        Raises:
            BenchmarkError: The process has ended, or has not mounted in time.
        """
        started = self._started
        started.mountpoint.mkdir(exist_ok=True)
        began = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                started.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(started),
                start_new_session=True,
            )
        self.pid = self._process.pid
        while find_mount(str(started.mountpoint)) is None:
            late = time.monotonic() - began > START_SECONDS
            if late or self._process.poll() is not None:
                self._end()
                lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
                msg = f"{started.command[0]}: found no mount: {(lines or ['no output'])[-1]}"
                raise BenchmarkError(msg)
            time.sleep(0.002)
        self.start_seconds = time.monotonic() - began
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Unmount, and end the process."""
        self._end()

    def _end(self) -> None:
        """Unmount, and kill the process if it goes on."""
        mountpoint = str(self._started.mountpoint)
        while find_mount(mountpoint) is not None:
            subprocess.run(["fusermount3", "-u", "-z", mountpoint], check=False, timeout=60)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
