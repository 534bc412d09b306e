"""The random parameters of a case: its image, its mount, its threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.support import qemu

if TYPE_CHECKING:
    import random
    from pathlib import Path

DISK_BYTES: Final = (256 << 10, (1 << 20) + 512, 3 << 20, (4 << 20) - 1536)
CLUSTER_BYTES: Final = (4096, 4096, 65536, 65536, 1 << 20)
OPTIONS: Final = {
    "growable": 0.5,
    "truncate=zero": 0.4,
    "direct_io": 0.2,
    "nodiscard": 0.2,
    "detect_zeroes=on": 0.1,
    "detect_zeroes=unmap": 0.1,
    "compact=full": 0.1,
    "cache_size=64K": 0.3,
}
"""Mount options, and the probability of each."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a case.

    Attributes:
        size: Bytes of the disk.
        cluster_size: Bytes.
        table_size: Clusters of a table.
        base: Whether there is a raw backing file.
        on_file: Whether the mountpoint is a file.
        words: The mount's options.
        threads: The number of concurrent threads.
        stripe: Bytes of a stripe; stripes are assigned to the threads round robin.
        phases: The number of phases of concurrent work.
        operations: The number of operations of each thread in a phase.
    """

    size: int
    cluster_size: int
    table_size: int
    base: bool
    on_file: bool
    words: tuple[str, ...]
    threads: int
    stripe: int
    phases: int
    operations: int

    @property
    def growable(self) -> bool:
        """Whether the mount is growable."""
        return "growable" in self.words

    @property
    def empties(self) -> bool:
        """Whether a truncation to 0 zeros the disk."""
        return "truncate=zero" in self.words

    @property
    def maps(self) -> bool:
        """Whether a shared memory map is possible."""
        return "direct_io" not in self.words

    def __str__(self) -> str:
        """Describe the case in one line."""
        return (
            f"{self.size} bytes, clusters {self.cluster_size}, tables {self.table_size}, "
            f"base {self.base}, file {self.on_file}, -o {','.join(self.words)}, "
            f"{self.threads} threads, stripes of {self.stripe}"
        )

    def make_image(self, directory: Path, chance: random.Random) -> tuple[Path, bytes]:
        """Make the image in a directory; return it and the content of its disk."""
        image, content = directory / "disk.qed", bytes(self.size)
        if not self.base:
            qemu.create(
                image, self.size, cluster_size=self.cluster_size, table_size=self.table_size
            )
            return image, content
        base = directory / "base.raw"
        data = chance.randbytes(self.size // 2) + bytes(self.size // 8)
        base.write_bytes(data)
        qemu.create(
            image,
            self.size,
            cluster_size=self.cluster_size,
            table_size=self.table_size,
            backing=base,
            backing_format="raw",
        )
        return image, data + content[len(data) :]


def draw_plan(chance: random.Random) -> Plan:
    """Draw the parameters of a case."""
    words = [f"commit={chance.choice(['0.05', '5'])}"]
    for word, probability in OPTIONS.items():
        if chance.random() < probability:
            words.append(word)
    return Plan(
        size=chance.choice(DISK_BYTES),
        cluster_size=chance.choice(CLUSTER_BYTES),
        table_size=chance.choice((2, 4)),
        base=chance.random() < 0.3,
        on_file=chance.random() < 0.2,
        words=tuple(words),
        threads=chance.choice((1, 2, 4)),
        # Whole pages: a page must not be written by one thread with O_DIRECT and cached by another.
        stripe=chance.choice((4096, 4096, 65536)),
        phases=chance.choice((4, 8)),
        operations=chance.choice((20, 100)),
    )
