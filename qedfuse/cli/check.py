"""``qedfuse check [--repair] IMAGE``: what is wrong with an image, and mending it."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from typing import BinaryIO, Final

import trio

from qedfuse.check.findings import CheckReport, Severity
from qedfuse.check.repair import RepairReport, repair_image
from qedfuse.check.walk import check_image
from qedfuse.disk.backing import read_header
from qedfuse.errors import HostError
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.util.text import printable

SOUND: Final = 0
LEAKS: Final = 3
ERRORS: Final = 13
"""Exit codes."""


def run_check(path: str, *, repair: bool) -> int:
    """Check or repair an image, print what there is to say, and give the exit code.

    Raises:
        QedError: The image cannot be opened, locked or read.
    """
    if repair:
        with closing(Backup(f"{path}.before-repair")) as backup:
            result = trio.run(_repair, path, backup)
        _print_repair(result, backup)
        report = result.after
    else:
        report = trio.run(_check, path)
    _print_report(path, report)
    if report.errors:
        return ERRORS
    return LEAKS if report.leaks else SOUND


async def _check(path: str) -> CheckReport:
    """Check an image that may be open elsewhere for reading."""
    file = PosixFile.open(path)
    try:
        lock_image(file.fd, LockMode.READ, file.name)
        return await check_image(file, await read_header(file))
    finally:
        file.close()


async def _repair(path: str, backup: Backup) -> RepairReport:
    """Repair an image that nobody else has open."""
    file = PosixFile.open(path, writable=True)
    try:
        lock_image(file.fd, LockMode.WRITE, file.name)
        return await repair_image(file, await read_header(file), backup.save)
    finally:
        file.close()


class Backup:
    """The old content of all tables that a repair changes, in a file beside the image.

    One line for each piece: the file offset in bytes, and the old bytes in hexadecimal.
    The file is made when there is something to save, and never written over.
    """

    def __init__(self, path: str) -> None:
        """Save to ``path``, or to a name like it if that is taken."""
        self.path = path
        self._file: BinaryIO | None = None

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()

    @property
    def used(self) -> bool:
        """Whether anything was saved."""
        return self._file is not None

    def save(self, offset: int, old: bytes) -> None:
        """Save bytes that are about to be changed; they are durable when this returns.

        Raises:
            HostError: They cannot be saved.
        """
        try:
            if self._file is None:
                self._file = self._create()
            self._file.write(b"%d %s\n" % (offset, old.hex().encode()))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise HostError.from_os(error, printable(self.path), "cannot save tables") from error

    def _create(self) -> BinaryIO:
        """Make a file whose name is not taken."""
        wanted, number = self.path, 1
        while True:
            try:
                return open(self.path, "xb")  # noqa: PTH123  a name, not a Path
            except FileExistsError:
                number += 1
                self.path = f"{wanted}.{number}"


def _print_report(path: str, report: CheckReport) -> None:
    """Print the findings, the worst first, and a summary."""
    for finding in sorted(report.findings, key=lambda item: -item.severity):
        print(f"{finding.severity.name.lower()}: {finding.code.value}: {finding.message}")
    shown = printable(path)
    hidden = sum(report.counts.values()) - len(report.findings)
    if hidden > 0 and report.errors:
        print(f"{shown}: {hidden} more findings of these kinds are not shown")
    notes = sum(count for code, count in report.counts.items() if code.severity is Severity.NOTE)
    listed = report.listed_clusters
    print(
        f"{shown}: {report.errors} errors, {report.leaks} leaked clusters, {notes} notes; "
        f"{report.allocated_clusters} clusters in use of {report.file_clusters} in the file"
        + ("" if listed is None else f"; {listed} free clusters in the list")
    )


def _print_repair(result: RepairReport, backup: Backup) -> None:
    """Print what a repair did, and what is lost."""
    for lost in result.lost:
        print(f"lost: {lost.length} bytes of the disk at {lost.start} ({lost.code.value})")
    print(f"repaired: {result.cleared} entries cleared, {result.copied} clusters copied")
    if backup.used:
        print(f"the tables as they were: {printable(backup.path)}")
    sys.stdout.flush()
