"""What a report says about the machine, the versions and the settings of a measurement."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.commands import BenchmarkError, run

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from benchmarks.systems import System


def facts(
    directory: Path,
    qedfuse: str,
    settings: str,
    peers: Iterable[Sequence[str]] = (("qemu-storage-daemon",),),
) -> dict[str, str]:
    """Describe the machine, the versions and the settings of a measurement.

    ``peers`` are the commands of the QEMU programs that are measured.
    """
    cpu = re.search(r"^model name\s*: (.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    filesystem = run("findmnt", "-n", "-o", "FSTYPE,OPTIONS", "--target", str(directory)).strip()
    versions = [
        *(version_line(command) for command in ((qedfuse,), *peers, ("fio",))),
        f"libfuse {version_line(('pkg-config',), '--modversion', 'fuse3')}",
        f"Python {platform.python_version()}",
    ]
    return {
        "processor": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{int(memory[1]) / (1 << 20):.1f} GiB" if memory else "unknown",
        "kernel": platform.release(),
        "file system of the host": " ".join(filesystem.split()),
        "versions": ", ".join(versions),
        "settings": settings,
    }


def version_line(command: Sequence[str], *options: str) -> str:
    """Return the first line that a program prints about its version, or "unknown"."""
    try:
        return run(*command, *(options or ("--version",))).splitlines()[0]
    except (BenchmarkError, OSError, IndexError):
        return "unknown"


def qemu_title(line: str) -> str:
    """Return the name and the version of a QEMU, from the line about its version."""
    found = re.search(r"version (\d[\d.]*)", line)
    return f"QEMU {found[1]}" if found else "QEMU"


def peer_titles(programs: Mapping[System, Sequence[str]]) -> dict[System, str]:
    """Return the titles of QEMU programs; those of the same version are numbered."""
    titles: dict[System, str] = {}
    for system, command in programs.items():
        title = qemu_title(version_line(command))
        same = sum(other.split(" no. ")[0] == title for other in titles.values())
        titles[system] = f"{title} no. {same + 1}" if same else title
    return titles


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")
