"""Partition tables that sfdisk writes."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from pathlib import Path


def partition(disk: Path, lines: list[str]) -> None:
    """Let sfdisk write a partition table to a raw file."""
    subprocess.run(
        ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", str(disk)],
        input="\n".join(lines) + "\n", text=True, check=True, capture_output=True,
    )  # fmt: skip


def draw_table(chance: random.Random) -> list[str]:
    """Draw the lines of a table for sfdisk, on a disk of 100 MiB."""
    label = chance.choice(["dos", "gpt"])
    count = chance.randrange(0, 5)
    lines = [f"label: {label}"]
    for number in range(count):
        if label == "dos" and number == 2:
            lines.append("size=30M, type=E")
            continue
        bootable = ", bootable" if label == "dos" and chance.random() < 0.3 else ""
        name = ', name="a name"' if label == "gpt" and chance.random() < 0.5 else ""
        size = chance.randrange(1, 16)
        lines.append(f"size={size}M, type={chance.choice('LSU')}{bootable}{name}")
    if label == "dos" and count == 4:
        lines += [f"size={chance.randrange(1, 8)}M, type=L" for _ in range(chance.randrange(0, 4))]
    return lines
