"""Measure the time of an unmount, and the leaks afterwards, with and without compaction.

    python -m benchmarks.unmount [--dir DIRECTORY]

The command mounts each image, which is then used; the measured time is from
``qedfuse umount`` to the end of the process, once for each value of ``compact``:

    day         1 GiB: ext4 is made, 600 MiB of files are written, half are deleted, fstrim
    half full   20 GiB, half allocated, of which 500 MiB are discarded in runs of any length
    full        1 TiB, fully allocated, of which 100 clusters are discarded one by one
    cold        the same, with the tables evicted from the host's page cache

Clusters that are neither moved nor read are holes (`benchmarks.sparse`); the last GiB of
the file of "half full", from which clusters move, is data.  "left" is the number of clusters
that `qedimg check` finds leaked; QEMU counts more, wrongly, in files of 4 GiB and more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.commands import BenchmarkError, run
from benchmarks.ext4 import FileSystem
from benchmarks.machine import facts
from benchmarks.mounted import Mounted, program, wait_until_idle
from benchmarks.pagecache import evict_file, sync_file
from benchmarks.report import number
from benchmarks.scale import ROOT
from benchmarks.sparse import GEOMETRY, build
from qedfuse.hostio.systemcalls import fallocate

if TYPE_CHECKING:
    from collections.abc import Callable

MIB: Final = 1 << 20
GIB: Final = 1 << 30
PUNCH: Final = 3
MODES: Final = ("off", "auto", "full")


class Scenario(NamedTuple):
    """An image, its use while it is mounted, and whether its tables are cold at the end."""

    name: str
    make: Callable[[Path], None]
    use: Callable[[Path, Path], None]
    cold: bool = False


def make_empty(path: Path) -> None:
    """Create an image of 1 GiB."""
    run(str(Path(program()).with_name("qedimg")), "create", "-q", str(path), "1G")


def spend_a_day(disk: Path, directory: Path) -> None:
    """Make a file system, write and delete files on it, and trim it."""
    chance = random.Random(1)
    files = FileSystem(disk, directory / "root", direct=False, read_only=False)
    files.root.mkdir(exist_ok=True)
    try:
        files.make()
        paths = [files.root / str(n) for n in range(200)]
        for path in paths:
            path.write_bytes(chance.randbytes(3 * MIB))
        run("sync", "-f", str(files.root))
        for path in paths[::2]:
            path.unlink()
        # Freed blocks can be trimmed only after the journal has been committed.
        run("sync", "-f", str(files.root))
        run("fstrim", str(files.root))
    finally:
        files.detach()


def make_half_full(path: Path) -> None:
    """Create an image of 20 GiB that is half full; the end of its file is data."""
    _, offsets = build(path, 20 * GIB, 10 * GIB // GEOMETRY.cluster_size, run=64)
    end = int(offsets.max()) + GEOMETRY.cluster_size
    with path.open("r+b", buffering=0) as file:
        for at in range(end - GIB, end, MIB):
            os.pwrite(file.fileno(), random.Random(at).randbytes(MIB), at)
    sync_file(path)


def discard_runs(disk: Path, _directory: Path) -> None:
    """Discard 500 MiB in short runs at random offsets."""
    chance = random.Random(2)
    left = 500 * MIB
    with disk.open("r+b", buffering=0) as file:
        while left > 0:
            start = os.lseek(file.fileno(), chance.randrange(19 * GIB), os.SEEK_DATA)
            length = chance.choice((1, 4, 16, 64)) * GEOMETRY.cluster_size
            fallocate(file.fileno(), PUNCH, start - start % GEOMETRY.cluster_size, length)
            left -= length
        os.fsync(file.fileno())


def make_full(path: Path) -> None:
    """Create an image of 1 TiB that is full."""
    build(path, 1024 * GIB, 1024 * GIB // GEOMETRY.cluster_size)
    sync_file(path)


def discard_some(disk: Path, _directory: Path) -> None:
    """Discard 100 single clusters at random offsets."""
    chance = random.Random(3)
    with disk.open("r+b", buffering=0) as file:
        for _ in range(100):
            at = chance.randrange(1024 * GIB // GEOMETRY.cluster_size) * GEOMETRY.cluster_size
            fallocate(file.fileno(), PUNCH, at, GEOMETRY.cluster_size)
        os.fsync(file.fileno())


SCENARIOS: Final = (
    Scenario("day", make_empty, spend_a_day),
    Scenario("half full", make_half_full, discard_runs),
    Scenario("full", make_full, discard_some),
    Scenario("cold", make_full, discard_some, cold=True),
)


def leaked(path: Path) -> int:
    """Return the number of leaked clusters of an image.

    Raises:
        BenchmarkError: The image is damaged.
    """
    command = str(Path(program()).with_name("qedimg"))
    words = f"{command} check --output json {path} || [ $? = 3 ]"
    found = json.loads(run("sh", "-c", words, seconds=300))
    if found.get("corruptions"):
        msg = f"{path}: damaged"
        raise BenchmarkError(msg)
    return int(found.get("leaks", 0))


def measure(scenario: Scenario, mode: str, directory: Path) -> tuple[float, int]:
    """Run a scenario; return the seconds of the unmount, and the number of leaked clusters."""
    path = directory / "vm.qed"
    path.unlink(missing_ok=True)
    scenario.make(path)
    with Mounted(program(), path, directory / "mnt", "-o", f"compact={mode}") as mounted:
        # In practice the scan has ended long before an unmount.
        wait_until_idle(mounted.pid)
        scenario.use(mounted.disk, directory)
        wait_until_idle(mounted.pid)
        sync_file(path)
        if scenario.cold:
            evict_file(path)
        seconds = mounted.stop()
    return seconds, leaked(path)


def main() -> None:
    """Parse the arguments, measure, and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=ROOT, help="where 4 GiB are free")
    parser.add_argument("--only", choices=[scenario.name for scenario in SCENARIOS])
    arguments = parser.parse_args()
    directory = arguments.dir
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    rows = []
    try:
        with tempfile.TemporaryDirectory(prefix="qedfuse-unmount-", dir=directory) as name:
            about = facts(Path(name), program(), "each once")
            for scenario in SCENARIOS:
                if arguments.only not in {None, scenario.name}:
                    continue
                found = [measure(scenario, mode, Path(name)) for mode in MODES]
                cells = [f"{number(seconds)} s, {left:,} left" for seconds, left in found]
                rows.append(f"| {scenario.name} | {' | '.join(cells)} |")
                print(rows[-1], file=sys.stderr)
    except (BenchmarkError, OSError) as error:
        sys.exit(f"unmount: {error}")
    print("".join(f"- {name}: {fact}\n" for name, fact in about.items()))
    print(f"| image | {' | '.join(f'`compact={mode}`' for mode in MODES)} |")
    print("\n".join(["|" + " --- |" * (1 + len(MODES)), *rows]))


if __name__ == "__main__":
    main()
