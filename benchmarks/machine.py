"""What a report says about the machine, the versions and the settings of a measurement."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.commands import BenchmarkError, run

if TYPE_CHECKING:
    from collections.abc import Iterable


def facts(directory: Path, qedfuse: str, settings: str) -> dict[str, str]:
    """Describe the machine, the versions and the settings of a measurement."""
    cpu = re.search(r"^model name\s*: (.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    filesystem = run("findmnt", "-n", "-o", "FSTYPE,OPTIONS", "--target", str(directory)).strip()
    return {
        "processor": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{int(memory[1]) / (1 << 20):.1f} GiB" if memory else "unknown",
        "kernel": platform.release(),
        "file system of the host": " ".join(filesystem.split()),
        "versions": ", ".join(_versions(qedfuse)),
        "settings": settings,
    }


def _versions(qedfuse: str) -> Iterable[str]:
    for command in (
        (qedfuse, "--version"),
        ("qemu-storage-daemon", "--version"),
        ("fio", "--version"),
        ("pkg-config", "--modversion", "fuse3"),
    ):
        try:
            line = run(*command).splitlines()[0]
        except (BenchmarkError, OSError, IndexError):
            line = "unknown"
        yield f"libfuse {line}" if command[0] == "pkg-config" else line
    yield f"Python {platform.python_version()}"


def _text(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")
