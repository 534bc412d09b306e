#!/usr/bin/env python3
"""List the partitions of an image, and the files in its FAT and ext2/3/4 file systems.

    examples/list_files.py IMAGE

Nothing is mounted and no privileges are needed: `qedfuse.open` returns the disk as a binary
file, backing files included, and dissect (pip install dissect.volume dissect.fat
dissect.extfs; its licence is the AGPL) reads partition tables and file systems from any
binary file.
"""

from __future__ import annotations

import io
import stat
import sys
from typing import TYPE_CHECKING, BinaryIO, cast

from dissect.extfs import ExtFS
from dissect.extfs.exceptions import Error as ExtError
from dissect.fat import FATFS
from dissect.fat.exceptions import Error as FatError
from dissect.volume.disk import Disk
from dissect.volume.exceptions import DiskError

import qedfuse
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    Entry = tuple[str, int, bool]  # name, bytes, whether it is a directory


def main(image: str) -> None:
    """Print the partitions and files of an image."""
    # The parsers make many small reads, which the buffer combines.
    with qedfuse.open(image) as disk, io.BufferedReader(disk, 1 << 16) as file:
        for title, volume in volumes(cast("BinaryIO", file)):
            kind, files = file_system(volume)
            print(f"{title}: {kind}")
            for path, size, is_directory in walk(files):
                print(f"{size:12}  {printable(path)}{'/' if is_directory else ''}")


def volumes(disk: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    """Yield a title and a file for each partition, or for the disk if it is a file system."""
    if file_system(disk)[1] is not None:
        yield "disk", disk
        return
    disk.seek(0)
    try:
        table = Disk(disk)
    except DiskError:
        print("no known partition table, and no known file system")
        return
    for partition in table.partitions:
        title = f"partition {partition.number} at {partition.offset}, {partition.type_name}"
        yield title, partition.open()


def file_system(volume: BinaryIO) -> tuple[str, ExtFS | FATFS | None]:
    """Return the name of a volume's file system, and its reader; None if it is unknown."""
    for reader, error in ((ExtFS, ExtError), (FATFS, FatError)):
        volume.seek(0)
        try:
            files = reader(volume)
        except (error, EOFError, NotImplementedError):
            continue
        return {ExtFS: "ext2/3/4", FATFS: "FAT"}[reader], files
    return "no known file system", None


def walk(files: ExtFS | FATFS | None) -> Iterator[Entry]:
    """Yield the path, the size in bytes and the kind of every file."""
    pending = [] if files is None else [""]
    while pending:
        directory = pending.pop()
        for name, size, is_directory in entries(files, directory):
            path = f"{directory}/{name}"
            yield path, size, is_directory
            if is_directory:
                pending.append(path)


def entries(files: ExtFS | FATFS, directory: str) -> Iterator[Entry]:
    """Yield the entries of a directory, with their names instead of paths."""
    node = files.get(directory or "/")
    for child in node.iterdir():
        if isinstance(files, FATFS):
            name, is_directory = child.name, child.is_directory()
        else:
            name, is_directory = child.filename, stat.S_ISDIR(child.filetype)
        if name not in (".", ".."):
            yield name, child.size, is_directory


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004  the program and its argument
        sys.exit("usage: list_files.py IMAGE")
    try:
        main(sys.argv[1])
    except (OSError, qedfuse.QedError, FatError, ExtError) as error:
        sys.exit(f"list_files.py: {error}")
