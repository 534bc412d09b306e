#!/usr/bin/env python3
"""List the partitions of an image, and the files in its FAT and ext2/3/4 file systems.

    examples/list_files.py IMAGE

Nothing is mounted and no privileges are needed: `qedfuse.open` gives the disk as a binary
file, backing files included, and dissect (pip install dissect.volume dissect.fat
dissect.extfs; its licence is the AGPL) reads partition tables and file systems out of any
such file.
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
    """Print what is in an image."""
    # The parsers read small pieces; the buffer makes larger ones of them.
    with qedfuse.open(image) as disk, io.BufferedReader(disk, 1 << 16) as file:
        for title, volume in volumes(cast("BinaryIO", file)):
            kind, files = file_system(volume)
            print(f"{title}: {kind}")
            for path, size, is_directory in walk(files):
                print(f"{size:12}  {printable(path)}{'/' if is_directory else ''}")


def volumes(disk: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    """Give the partitions, or the disk itself where it is one file system."""
    if file_system(disk)[1] is not None:
        yield "disk", disk
        return
    disk.seek(0)
    try:
        table = Disk(disk)
    except DiskError:
        print("no partition table that is known, and no file system")
        return
    for partition in table.partitions:
        title = f"partition {partition.number} at {partition.offset}, {partition.type_name}"
        yield title, partition.open()


def file_system(volume: BinaryIO) -> tuple[str, ExtFS | FATFS | None]:
    """Recognise a file system."""
    for reader, error in ((ExtFS, ExtError), (FATFS, FatError)):
        volume.seek(0)
        try:
            files = reader(volume)
        except (error, EOFError, NotImplementedError):
            continue
        return {ExtFS: "ext2/3/4", FATFS: "FAT"}[reader], files
    return "no file system that is known", None


def walk(files: ExtFS | FATFS | None) -> Iterator[Entry]:
    """List all files with their paths."""
    waiting = [] if files is None else [""]
    while waiting:
        place = waiting.pop()
        for name, size, is_directory in entries(files, place):
            path = f"{place}/{name}"
            yield path, size, is_directory
            if is_directory:
                waiting.append(path)


def entries(files: ExtFS | FATFS, directory: str) -> Iterator[Entry]:
    """List one directory."""
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
