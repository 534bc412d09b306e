"""SIGINT at any moment: no partial image remains, and none that was changed is damaged.

The program runs in its own process, in which the n-th change of a file, or the n-th report of
progress, sends SIGINT; and so do all that follow, as when a user keeps pressing Ctrl-C.  So
each moment can be repeated on any machine.
"""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from tests.support import programs, qemu
from tests.support.disks import get_entry, l2_entry_offset, put_entry
from tests.support.share import share

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CLUSTER_BYTES: Final = 4096
CLUSTERS: Final = 300
MAX_MOMENTS: Final = share(1, of=3)
"""Interrupted runs of each command for each kind of moment, besides the first and last."""
DONE, LEAKS, INTERRUPTED = 0, 3, 130

_COUNTED: Final = """
import atexit, os, signal, sys
when, kind, total = int(sys.argv[1]), sys.argv[2], sys.argv[3]
del sys.argv[1:4]
count = 0

def moment():
    global count
    count += 1
    if 0 < when <= count:
        os.kill(os.getpid(), signal.SIGINT)

def counted(function):
    def call(*arguments, **named):
        if kind == "before":
            moment()
        try:
            return function(*arguments, **named)
        finally:
            if kind != "before":
                moment()
    return call

if kind == "report":
    from qedfuse.cli.qedimg.progress import Meter
    Meter.report = counted(Meter.report)
else:
    for name in (
        "pwrite pwritev write writev fsync fdatasync ftruncate truncate posix_fallocate replace "
        "rename link unlink remove copy_file_range sendfile splice"
    ).split():
        setattr(os, name, counted(getattr(os, name)))

def report():
    with open(total, "w") as file:
        file.write(str(count))

atexit.register(report)
"""


class Case(NamedTuple):
    """A command, and the images that it uses.

    Attributes:
        words: The command line; images are in the working directory.
        prepare: Makes the images; returns the content of the disk ``reads``.
        reads: The image that must read the same before, during and after.
        made: The file that the command creates, if it does.
        images: Images that must be sound whenever the command ends.
        keeps: A pattern of further files that the command may leave.
    """

    words: str
    prepare: Callable[[Path, random.Random], bytes]
    reads: str
    made: str = ""
    images: tuple[str, ...] = ()
    keeps: str = ""


def fill(path: Path, disk: bytearray, chance: random.Random, share: float) -> None:
    """Write to some clusters of an image through QEMU, and to the model."""
    commands = []
    for cluster in chance.sample(range(CLUSTERS), int(CLUSTERS * share)):
        start_at, value = cluster * CLUSTER_BYTES, chance.randrange(256)
        commands.append(f"write -P {value} {start_at} {CLUSTER_BYTES}")
        disk[start_at : start_at + CLUSTER_BYTES] = bytes([value]) * CLUSTER_BYTES
    for cluster in chance.sample(range(CLUSTERS), 8):
        commands.append(f"write -z {cluster * CLUSTER_BYTES} {CLUSTER_BYTES}")
        disk[cluster * CLUSTER_BYTES : (cluster + 1) * CLUSTER_BYTES] = bytes(CLUSTER_BYTES)
    qemu.io(path, *commands)


def create(path: Path, base: str = "") -> Path:
    """Create an image with small clusters, so that few bytes need many changes."""
    return qemu.create(
        path,
        CLUSTERS * CLUSTER_BYTES,
        cluster_size=CLUSTER_BYTES,
        table_size=2,
        backing=base or None,
    )


def chain(directory: Path, chance: random.Random) -> bytes:
    """Make an overlay over a base, and another base of other content."""
    disk = bytearray(CLUSTERS * CLUSTER_BYTES)
    fill(create(directory / "base.qed"), disk, chance, 0.6)
    fill(create(directory / "top.qed", "base.qed"), disk, chance, 0.4)
    fill(create(directory / "other.qed"), bytearray(disk), chance, 0.6)
    return bytes(disk)


def sparse(directory: Path, chance: random.Random) -> bytes:
    """Make an image with free clusters: half of those in the file."""
    disk = bytearray(CLUSTERS * CLUSTER_BYTES)
    path = create(directory / "top.qed")
    fill(path, disk, chance, 0.9)
    image = bytearray(path.read_bytes())
    for number in chance.sample(range(CLUSTERS), CLUSTERS // 2):
        put_entry(image, l2_entry_offset(image, number), 0)
        disk[number * CLUSTER_BYTES : (number + 1) * CLUSTER_BYTES] = bytes(CLUSTER_BYTES)
    path.write_bytes(image)
    return bytes(disk)


def zeros(directory: Path, _chance: random.Random) -> bytes:
    """Make an image of zeros."""
    create(directory / "top.qed")
    return bytes(CLUSTERS * CLUSTER_BYTES)


def damaged(directory: Path, chance: random.Random) -> bytes:
    """Make an image with leaks and with bad entries where the disk holds zeros."""
    disk = sparse(directory, chance)
    path = directory / "top.qed"
    image = bytearray(path.read_bytes())
    empty = [
        number
        for number in range(CLUSTERS)
        if get_entry(image, l2_entry_offset(image, number)) == 0
    ]
    for number in chance.sample(empty, 20):
        put_entry(image, l2_entry_offset(image, number), 1 << 40)
    path.write_bytes(image)
    return disk


CASES: Final = {
    "convert-qed": Case(
        "convert -O qed top.qed new.qed", chain, "top.qed", "new.qed", ("top.qed", "base.qed")
    ),
    "convert-raw": Case(
        "convert -O raw top.qed new.raw", chain, "top.qed", "new.raw", ("top.qed", "base.qed")
    ),
    "commit": Case("commit top.qed", chain, "top.qed", images=("top.qed", "base.qed")),
    "rebase": Case(
        "rebase -b other.qed -F qed top.qed", chain, "top.qed", images=("top.qed", "other.qed")
    ),
    "rebase-none": Case("rebase -b  top.qed", chain, "top.qed", images=("top.qed",)),
    "create": Case(
        f"create --preallocate full new.qed {CLUSTERS * CLUSTER_BYTES}", zeros, "top.qed", "new.qed"
    ),
    "check": Case("check -r all top.qed", damaged, "top.qed", keeps="top.qed.*"),
    "check-leaks": Case("check -r leaks top.qed", sparse, "top.qed", images=("top.qed",)),
    "compact": Case("compact top.qed", sparse, "top.qed", images=("top.qed",)),
}


def run(case: Case, directory: Path, when: int, kind: str) -> tuple[int, int]:
    """Run the command with a signal at a moment; return its exit code and its number of moments."""
    total = directory.parent / "total"
    words = [str(when), kind, str(total), *case.words.split(" ")]
    done = programs.run("qedimg", *words, timeout=60, patch=_COUNTED, cwd=directory)
    code, complaint = done.returncode, done.stderr
    if code == LEAKS and case.words.startswith("check -r all"):
        code = DONE
    assert "Traceback" not in complaint
    assert code in {DONE, INTERRUPTED}, complaint
    assert (complaint == "qedimg: interrupted\n") is (code == INTERRUPTED), complaint
    return code, int(total.read_text())


def content(path: Path, flat: Path) -> bytes:
    """Read a disk through QEMU."""
    if path.suffix == ".raw":
        return path.read_bytes()
    qemu.run("qemu-img", "convert", "-f", "qed", "-O", "raw", path, flat)
    return flat.read_bytes()


def assert_left_sound(
    case: Case, directory: Path, disk: bytes, before: set[str], code: int
) -> None:
    """Assert that all files that the command left are expected, sound and of the right content."""
    flat = directory.parent / "flat"
    expected = before | ({case.made} if case.made and code == DONE else set())
    if case.made and (directory / case.made).exists():
        # A signal after the file got its name leaves a complete file.
        expected |= {case.made}
    kept = {path.name for path in directory.glob(case.keeps)} if case.keeps else set()
    assert {path.name for path in directory.iterdir()} - kept == expected - kept
    for name in (*case.images, *([case.made] if case.made.endswith("qed") else [])):
        if name in expected:
            found = qemu.check(directory / name)
            assert found.errors == 0, found.text
            assert found.code in {0, 3}, found.text
    assert content(directory / case.reads, flat) == disk
    if case.made in expected:
        assert content(directory / case.made, flat) == disk


@pytest.mark.parametrize("kind", ["before", "after", "report"])
@pytest.mark.parametrize("name", CASES)
def test_interrupted_at_any_moment(name: str, kind: str, tmp_path: Path) -> None:
    """An interrupted command leaves sound images, and the same command then succeeds."""
    case = CASES[name]
    chance = random.Random(f"{name} {kind}")
    original = tmp_path / "original"
    original.mkdir()
    disk = case.prepare(original, chance)
    before = {path.name for path in original.iterdir()}
    directory = tmp_path / "place"
    shutil.copytree(original, directory)
    code, total = run(case, directory, 0, kind)
    assert code == DONE
    assert total > 0
    assert_left_sound(case, directory, disk, before, code)
    last = total if total <= 3 else max(total - 2, 1)
    moments = {1, last, *chance.sample(range(1, total + 1), min(MAX_MOMENTS, total))}
    interrupted = 0
    for when in sorted(moments):
        shutil.rmtree(directory)
        shutil.copytree(original, directory)
        code, _ = run(case, directory, when, kind)
        interrupted += code == INTERRUPTED
        if code == DONE or name != "check":
            assert_left_sound(case, directory, disk, before, code)
        else:
            # A partial repair may leave errors, but no more than before.
            worst = qemu.check(original / case.reads).errors
            assert qemu.check(directory / case.reads).errors <= worst
        if code == INTERRUPTED and not (case.made and (directory / case.made).exists()):
            assert run(case, directory, 0, kind)[0] == DONE
            assert_left_sound(case, directory, disk, before, DONE)
    assert interrupted > 0


_SECOND_CHUNK: Final = """
import os, signal
from qedfuse.tools.target.qedtarget import ExistingQedTarget
from qedfuse.tools.target.rawtarget import ExistingRawTarget

def interrupting(write_chunk):
    async def write(self, start, *arguments):
        await write_chunk(self, start, *arguments)
        if start:
            os.kill(os.getpid(), signal.SIGINT)
    return write

for kind in (ExistingQedTarget, ExistingRawTarget):
    kind.write_chunk = interrupting(kind.write_chunk)
"""


@pytest.mark.parametrize("form", ["qed", "raw"])
def test_a_partial_copy_into_an_existing_disk_is_reported(form: str, tmp_path: Path) -> None:
    """After an interruption of -n a line names the target, and the same command completes it."""
    old, new = b"o" * (16 << 20), b"n" * (16 << 20)
    (tmp_path / "old").write_bytes(old)
    (tmp_path / "new").write_bytes(new)
    target, flat = tmp_path / "target", tmp_path / "flat"
    qemu.convert(tmp_path / "old", target, source_format="raw", target_format=form)
    words = ["convert", "-n", "-f", "raw", "-O", form, "new", "target"]
    done = programs.run("qedimg", *words, timeout=60, patch=_SECOND_CHUNK, cwd=tmp_path)
    assert done.returncode == INTERRUPTED
    partial = "qedimg: target: the copy ended early: old and new content may be mixed\n"
    assert done.stderr == partial + "qedimg: interrupted\n"
    assert set(qemu.convert(target, flat, source_format=form).read_bytes()) == set(b"on")
    assert programs.qedimg(*words, cwd=tmp_path) == (DONE, "", "")
    assert qemu.convert(target, flat, source_format=form).read_bytes() == new
