"""``qedimg check`` compared with ``qemu-img check``, and what it leaves of a damaged image."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from qedfuse.check.fastcheck import fast_check
from qedfuse.check.findings import Code
from qedfuse.cli.qedimg.main import main
from qedfuse.errors import HostError
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.ondisk.constants import ZERO, Feature
from qedfuse.ondisk.header import Header, build_header
from qedfuse.tools.repair import imagecheck as tool
from qedfuse.tools.repair.backup import Backup
from tests.support import qemu
from tests.support.disks import (
    build_image,
    get_entry,
    guest_bytes,
    l2_entry_offset,
    pattern,
    put_entry,
)
from tests.support.disks import header_of as header_in
from tests.support.extensions import needs_extensions
from tests.support.fakecommand import finish, start
from tests.support.share import share

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.hostio.hostfile import Buffer

CLUSTER_BYTES: Final = 4096
QEMU_KEYS: Final = (
    "filename", "format", "check-errors", "total-clusters", "allocated-clusters",
    "fragmented-clusters", "corruptions", "leaks",
)  # fmt: skip


def check(path: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    """Run the command with JSON; give its exit code and its output."""
    code = main(["check", "--output", "json", *arguments, str(path)])
    said = capsys.readouterr()
    assert said.err == ""
    return code, json.loads(said.out)


def digest(path: Path) -> str:
    """Return the hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def random_image(path: Path, chance: random.Random) -> Header:
    """Let QEMU write an image of any geometry, with a few clusters at random places.

    QEMU opens no image whose tables have one cluster.
    """
    cluster_size, table_size = 1 << chance.randrange(12, 22), 1 << chance.randrange(1, 5)
    table_size = min(table_size, (1 << 24) // cluster_size)
    span = cluster_size * (cluster_size * table_size // 8)
    size = chance.randrange(1, min(3 * span, 1 << 36) // 512) * 512
    qemu.create(path, size, cluster_size=cluster_size, table_size=table_size)
    offsets = [chance.randrange(size // 512) * 512 for _ in range(chance.randrange(1, 9))]
    writes = []
    for offset in offsets:
        length = min(size - offset, chance.choice([512, 4096, cluster_size, 5 * cluster_size]))
        writes.append(f"write -P {chance.randrange(1, 256)} {offset} {min(length, 1 << 21)}")
    qemu.io(path, *writes)
    return header(path)


def header(path: Path) -> Header:
    """Read the header of an image file."""
    with path.open("rb") as file:
        return header_in(file.read(64))


def entries(path: Path, table: int, count: int) -> list[tuple[int, int]]:
    """List the entries of a table that are in use: their offsets in the file, and their values."""
    with path.open("rb") as file:
        file.seek(table)
        raw = file.read(8 * count)
    values = [(table + at, get_entry(raw, at)) for at in range(0, len(raw), 8)]
    return [(offset, value) for offset, value in values if value]


def set_entry(path: Path, offset: int, value: int) -> None:
    """Overwrite an entry."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(8, "little"))


def damage(path: Path, chance: random.Random) -> None:
    """Damage an image in ways that both programs see alike."""
    head = header(path)
    count = head.geometry.entries
    tables = entries(path, head.l1_table_offset, count)
    data = [pair for _place, table in tables for pair in entries(path, table, count)]
    size, length = head.cluster_size, path.stat().st_size
    for _ in range(chance.randrange(4)):
        kind = chance.randrange(6)
        offset, value = chance.choice(data)
        if kind == 0:
            set_entry(path, offset, 0)
        elif kind == 1:
            set_entry(path, offset, chance.choice([length, 1 << 40, 1 << 62, (1 << 64) - size]))
        elif kind == 2:
            set_entry(path, offset, value + chance.choice([8, 512]))
        elif kind == 3:
            set_entry(path, offset, chance.choice(data)[1])
        elif kind == 4:
            os.truncate(path, max(path.stat().st_size, length) + size * chance.randrange(1, 9))
        else:
            set_entry(path, chance.choice(tables)[0], chance.choice([length + size, 1 << 45]))


@pytest.mark.parametrize("seed", range(share(10, of=24)))
def test_findings_and_repairs_agree_with_qemu(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON and exit code are QEMU's for any damage, and QEMU finds nothing after the repair."""
    chance = random.Random(seed)
    path = tmp_path / "image.qed"
    random_image(path, chance)
    damage(path, chance)
    before = digest(path)
    theirs = qemu.check(path)
    code, ours = check(path, capsys=capsys)
    assert digest(path) == before
    assert code == theirs.code
    assert {key: ours[key] for key in QEMU_KEYS if key in ours} == {
        key: theirs.data[key] for key in QEMU_KEYS if key in theirs.data
    }
    assert len(ours["findings"]) >= bool(code)
    severities = {item["severity"] for item in ours["findings"]}
    assert ("error" in severities, "leak" in severities) == (code == 2, "leaks" in ours)

    planned_code, planned = check(path, "-r", "all", "--dry-run", capsys=capsys)
    assert (planned_code, digest(path)) == (code, before)
    force = ["--force"] if planned["repair"]["needs-force"] else []
    repaired_code, repaired = check(path, "-r", "all", *force, capsys=capsys)
    kept = repaired["repair"]["leaks-kept"]
    assert (repaired_code, kept) in ((0, False), (3, code == 2))
    assert repaired.get("corruptions-fixed", 0) == ours.get("corruptions", 0)
    assert repaired["repair"]["lost"] == planned["repair"]["lost"]
    for key in ("entries-cleared", "clusters-copied", "bytes-written"):
        assert repaired["repair"][key] == planned["repair"][key], key
    clean = qemu.check(path)
    assert (clean.code, clean.leaks) == (repaired_code, repaired.get("leaks", 0))
    assert main(["check", "-q", "-r", "leaks", "--force", str(path)]) == 0
    clean = qemu.check(path)
    assert (clean.code, clean.errors, clean.leaks) == (0, 0, 0)


def test_one_note_stands_for_many_entries_past_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A note on many entries hides no finding, and the entries are no part of the disk."""
    tables, entries_of_table = 60, CLUSTER_BYTES // 8
    past_end = [*range(2, 161), *range(entries_of_table, (tables + 1) * entries_of_table, 512)]
    path = tmp_path / "vm.qed"
    clusters = dict.fromkeys([0, *past_end], b"x")
    path.write_bytes(build_image(2 * CLUSTER_BYTES, clusters))
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"note: data-past-image-size: {path}: L1 table: found 60 entries past the disk's end",
        f"note: data-past-image-size: {path}: L1 entry 0: found 159 L2 entries past the disk's end",
        f"{path}: sound: errors: 0, leaked clusters: 0, notes: 219",
        "1/2 = 50.00% allocated, 0.00% fragmented",
    ]
    assert check(path, capsys=capsys)[1]["allocated-clusters"] == 1 + 159 + 60


def test_hidden_findings_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only 50 findings of a kind are shown, and the number of all others is printed."""
    path = tmp_path / "vm.qed"
    bad = dict.fromkeys(range(70), 1 << 40)
    path.write_bytes(build_image(80 * CLUSTER_BYTES, {**bad, 75: b"x"}))
    assert main(["check", str(path)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert sum("l2-out-of-file" in line for line in lines) == 50
    assert f"{path}: 20 more findings of these kinds are not shown" in lines


@needs_extensions
@pytest.mark.parametrize("seed", range(6))
def test_the_fast_check_agrees_with_the_check(
    seed: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fast check takes sound images, and its output is that of the check."""
    chance = random.Random(1000 + seed)
    path = tmp_path / "image.qed"
    random_image(path, chance)
    assert fast_check(str(path)) is not None
    fast = check(path, capsys=capsys)
    monkeypatch.setattr("qedfuse.check.fastcheck._load", lambda: None)
    assert fast_check(str(path)) is None
    assert fast == check(path, capsys=capsys)
    assert fast[0] == 0


@needs_extensions
@pytest.mark.parametrize("row", ["appended", "odd", "table-twice", "table-wild", "past-end"])
def test_the_fast_check_leaves_doubtful_images_to_the_check(row: str, tmp_path: Path) -> None:
    """The fast check gives up at anything that is not certainly sound."""
    path = tmp_path / "image.qed"
    content = build_image(40 * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(9)})
    path.write_bytes(content)
    assert fast_check(str(path)) is not None
    table = header_in(content).l1_table_offset
    if row in ("appended", "odd"):
        os.truncate(path, len(content) + (CLUSTER_BYTES if row == "appended" else 1))
    elif row == "table-twice":
        set_entry(path, table + 8, get_entry(content, table))
    elif row == "table-wild":
        set_entry(path, table, (1 << 64) - CLUSTER_BYTES)
    else:
        offset = l2_entry_offset(content, 8)
        set_entry(path, offset, 0)
        set_entry(path, offset + 8 * 40, get_entry(content, offset))
    assert fast_check(str(path)) is None


def test_leaks_are_given_back_to_the_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a repair of leaks the file is as short as possible, and nothing else has changed."""
    path = tmp_path / "image.qed"
    content = build_image(
        64 * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(20)}, table_size=2
    )
    for number in (3, 4, 11):
        put_entry(content, l2_entry_offset(content, number), 0)
    content[16] |= Feature.NEED_CHECK
    path.write_bytes(content + b"x" * 7 * CLUSTER_BYTES)
    before = guest_bytes(content)
    assert check(path, capsys=capsys)[0] == 3
    code, found = check(path, "-r", "leaks", capsys=capsys)
    assert (code, found["leaks-fixed"], found.get("leaks")) == (0, 10, None)
    after = path.read_bytes()
    assert len(after) == found["repair"]["file-size"] == len(content) - 3 * CLUSTER_BYTES
    assert guest_bytes(after) == before
    assert not header_in(after).need_check
    assert qemu.check(path).code == 0


def test_leaks_of_a_damaged_image_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Leaks of a damaged image are kept: a bad entry may have been meant for one of them."""
    path = tmp_path / "image.qed"
    content = build_image(64 * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(5)})
    put_entry(content, l2_entry_offset(content, 2), 1 << 40)
    path.write_bytes(content)
    code, found = check(path, "-r", "leaks", capsys=capsys)
    assert (code, found["corruptions"], found["leaks"]) == (2, 1, 1)
    assert path.read_bytes() == content
    assert main(["check", "-r", "leaks", str(path)]) == 2
    assert "leaked space is not freed while there is damage" in capsys.readouterr().out


def test_no_leaks_are_mentioned_where_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repair says that space is freed or kept only if space is, or may become, leaked."""
    path = tmp_path / "image.qed"
    content = build_image(64 * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(5)})
    offset = l2_entry_offset(content, 2)
    put_entry(content, offset + 8 * 40, get_entry(content, offset))
    path.write_bytes(content)
    code, planned = check(path, "-r", "all", "--dry-run", capsys=capsys)
    assert (code, planned["corruptions"], planned.get("leaks")) == (2, 1, None)
    assert main(["check", "-r", "all", "--dry-run", str(path)]) == 2
    assert "space that the repair leaks would stay, because" in capsys.readouterr().out
    assert main(["check", "-r", "all", str(path)]) == 0
    assert f"\nthe file had {len(content)} bytes and has " in (said := capsys.readouterr().out)
    assert "freed" not in said
    assert "leaked space" not in said
    assert (tmp_path / "image.qed.before-repair").exists()
    code, planned = check(path, "-r", "all", "--dry-run", capsys=capsys)
    assert (code, planned["repair"]["leaks-kept"]) == (0, False)
    assert main(["check", "-r", "all", "--dry-run", str(path)]) == 0
    assert "space" not in capsys.readouterr().out
    path.write_bytes(path.read_bytes() + bytes(CLUSTER_BYTES))
    code, planned = check(path, "-r", "all", "--dry-run", capsys=capsys)
    assert (code, planned["repair"]["leaks-kept"]) == (3, True)


def test_a_repair_saves_the_tables_and_reports_what_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repair prints the lost ranges and the backup, which holds the old bytes of the tables."""
    path = tmp_path / "image.qed"
    content = build_image(
        64 * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(5)}, table_size=2
    )
    offset = l2_entry_offset(content, 2)
    put_entry(content, offset, 1 << 40)
    put_entry(content, offset + 8, get_entry(content, offset + 16))
    path.write_bytes(content)
    assert main(["check", "-r", "all", "--dry-run", str(path)]) == 2
    assert (
        f"would be lost: {CLUSTER_BYTES} bytes of the disk at {2 * CLUSTER_BYTES}"
        in capsys.readouterr().out
    )
    assert os.listdir(tmp_path) == ["image.qed"]  # noqa: PTH208  names
    assert main(["check", "-r", "all", str(path)]) == 3
    said = capsys.readouterr().out
    assert (
        f"\nlost: {CLUSTER_BYTES} bytes of the disk at {2 * CLUSTER_BYTES} (l2-out-of-file)\n"
        in said
    )
    assert "repaired: 1 entries cleared, 1 clusters copied" in said
    backup = tmp_path / "image.qed.before-repair"
    assert f"backup of all that the repair changes: {backup}\n" in said
    for line in backup.read_text(encoding="ascii").splitlines()[1:-1]:
        entry_offset, old, _new = line.split()
        assert content[int(entry_offset) :].startswith(bytes.fromhex(old))
    disk = guest_bytes(path.read_bytes())
    for number in (0, 1, 3, 4):
        part = disk[number * CLUSTER_BYTES : (number + 1) * CLUSTER_BYTES]
        assert part == pattern(CLUSTER_BYTES, 4 if number == 3 else number)
    assert main(["check", "-q", str(path)]) == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("words", [(), ("-q",), ("--output", "json")], ids=str)
def test_what_an_interrupted_repair_has_lost_is_printed(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    """The lost ranges and the backup are printed before the first change; a second run has none."""
    path = tmp_path / "image.qed"
    content = build_image(
        64 * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(5)}, table_size=2
    )
    offset = l2_entry_offset(content, 2)
    put_entry(content, offset, 1 << 40)
    put_entry(content, offset + 8, get_entry(content, offset + 16))
    path.write_bytes(content)
    printed: list[str] = []
    real = PosixFile.pwrite

    async def pwrite(file: PosixFile, at: int, data: Buffer) -> None:
        printed.append(capfd.readouterr().out)
        await real(file, at, data)

    async def truncate(file: PosixFile, _size: int) -> None:
        msg = f"{file.name}: truncate: File too large"
        raise HostError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(PosixFile, "pwrite", pwrite)
        patch.setattr(PosixFile, "truncate", truncate)
        assert main(["check", "-r", "all", *words, str(path)]) == 1
    assert get_entry(path.read_bytes(), offset) == 0
    lost = f"\nlost: {CLUSTER_BYTES} bytes of the disk at {2 * CLUSTER_BYTES} (l2-out-of-file)\n"
    backup = f"\nbackup of all that the repair changes: {path}.before-repair\n"
    assert (lost in printed[0]) == (backup in printed[0]) == (not words)
    assert "".join(printed[1:]) == capfd.readouterr().out == ""
    assert main(["check", "-r", "all", str(path)]) in {0, 3}
    assert "lost: " not in capfd.readouterr().out


def test_what_a_killed_repair_has_lost_is_printed(tmp_path: Path) -> None:
    """The lost ranges do not stay in a buffer of the process until its end."""
    path = tmp_path / "image.qed"
    content = build_image(64 * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(5)})
    put_entry(content, l2_entry_offset(content, 2), 1 << 40)
    path.write_bytes(content)
    script = (
        "import os, sys\n"
        "from qedfuse.cli.qedimg.main import main\n"
        "from qedfuse.hostio.posixfile import PosixFile\n"
        "PosixFile.pwrite = lambda *_: os._exit(9)\n"
        "main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "check", "-r", "all", path],
        capture_output=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        check=False,
    )
    assert done.returncode == 9
    assert b"\nlost: %d bytes" % CLUSTER_BYTES in done.stdout


def test_a_repair_whose_output_cannot_be_written_is_completed(tmp_path: Path) -> None:
    """A full or closed stdout does not leave a repair undone behind its backup."""
    path = tmp_path / "image.qed"
    content = build_image(64 * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(5)})
    put_entry(content, l2_entry_offset(content, 2), 1 << 40)
    path.write_bytes(content)
    with open("/dev/full", "w", encoding="ascii") as full:  # noqa: PTH123  a device
        done = subprocess.run(
            [sys.executable, "-m", "qedfuse.cli.qedimg", "check", "-r", "all", path],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    # Which code depends on whether Python buffers the output.
    assert done.returncode in {1, 3}
    assert done.stderr.count(b"\n") == 1
    assert b"standard output: No space left on device" in done.stderr
    assert get_entry(path.read_bytes(), l2_entry_offset(content, 2)) == 0
    assert main(["check", "-q", str(path)]) == 3


def test_a_repair_that_takes_much_space_needs_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostile overlay that needs a table for each bad entry is refused unless forced.

    The refusal comes before the backup, which can be longer than the image.
    """
    path = tmp_path / "image.qed"
    head = Header(65536, 4, 1, 1, 0, 0, 65536, 1 << 46, 64, 4)
    with path.open("wb") as file:
        file.truncate(head.l1_end)
        file.write(build_header(head) + b"base")
        file.seek(head.l1_table_offset)
        file.write((1 << 50 | 1).to_bytes(8, "little") * 300)
        # One valid entry: without any, the image would be refused for that reason.
        file.write(head.l1_end.to_bytes(8, "little"))
        file.seek(head.l1_end)
        file.write((head.l1_end + 4 * 65536).to_bytes(8, "little"))
        file.truncate(head.l1_end + 5 * 65536)
    before = digest(path)
    saved: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Backup, "save", lambda _backup, offset, *_bytes: saved.append(offset))
        assert main(["check", "-r", "all", str(path)]) == 1
    assert not saved
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "not repaired: found damage that takes 75 MiB to repair, expected at most 64" in said.err
    assert digest(path) == before
    _code, found = check(path, "-r", "all", "--dry-run", capsys=capsys)
    assert found["repair"]["needs-force"]
    code, found = check(path, "-r", "all", "--force", capsys=capsys)
    assert (code, found["corruptions-fixed"]) == (0, 300)
    # QEMU's check opens the base as well.
    (tmp_path / "base").write_bytes(b"b")
    assert qemu.check(path).code == 0


def test_a_repair_past_the_largest_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the repaired file would exceed the largest size, one line says so and nothing changes."""
    path = tmp_path / "image.qed"
    content = build_image(64 * CLUSTER_BYTES, {0: b"a", 1: b"b"}, table_size=16)
    length = len(content)
    put_entry(content, header_in(content).l1_table_offset, length)
    path.write_bytes(content + bytes(100))
    before = digest(path)
    monkeypatch.setattr("qedfuse.check.rewrite.MAX_OFFSET", length + CLUSTER_BYTES)
    for word in ("--force", "--dry-run"):
        assert main(["check", "-r", "all", word, str(path)]) == 1
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert f"file size: found {length + 16 * CLUSTER_BYTES}, expected at most" in said.err
    assert digest(path) == before


REPAIR_WRITES: Final = 7
"""Writes of the repair in the next test; the last case interrupts none of them."""


@pytest.mark.parametrize("moment", range(1, REPAIR_WRITES + 2))
def test_an_interrupted_repair_is_no_worse(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair cancelled at any write loses nothing that was readable, and can be repeated."""
    path = tmp_path / "image.qed"
    numbers = [*range(12), 600]
    content = build_image(2 << 21, {n: pattern(CLUSTER_BYTES, n) for n in numbers})
    l1 = header_in(content).l1_table_offset
    for number in (3, 5):
        value = get_entry(content, l2_entry_offset(content, 0))
        put_entry(content, l2_entry_offset(content, number), value)
    put_entry(content, l2_entry_offset(content, 7), 1 << 45)
    put_entry(content, l1 + 16, get_entry(content, l1))
    path.write_bytes(content)
    expected = {n: pattern(CLUSTER_BYTES, 0 if n in (3, 5) else n) for n in numbers if n != 7}
    writes = 0

    async def interrupted() -> None:
        with trio.CancelScope() as scope:
            real = PosixFile.pwrite

            async def pwrite(self: PosixFile, offset: int, *parts: Buffer) -> None:
                nonlocal writes
                writes += 1
                if writes == moment:
                    scope.cancel()
                await trio.lowlevel.checkpoint_if_cancelled()
                await real(self, offset, *parts)

            monkeypatch.setattr(PosixFile, "pwrite", pwrite)
            await tool.repair(str(path), "all")

    def readable() -> bool:
        disk = guest_bytes(path.read_bytes())
        return all(
            disk[n * CLUSTER_BYTES : (n + 1) * CLUSTER_BYTES] == part
            for n, part in expected.items()
        )

    trio.run(interrupted)
    monkeypatch.undo()
    assert readable()
    assert writes == min(moment, REPAIR_WRITES)
    result = trio.run(tool.repair, str(path), "all")
    assert set(result.after.counts) <= {Code.LEAKED_CLUSTERS}
    assert readable()
    result = trio.run(tool.repair, str(path), "leaks")
    assert not result.after.counts
    assert readable()


def test_ctrl_c_during_a_check_changes_nothing(tmp_path: Path) -> None:
    """SIGINT during a check exits with 130 without a traceback, and the image does not change."""
    path = tmp_path / "image.qed"
    content = build_image(1 << 20, {0: b"a", 1: 1 << 40})
    path.write_bytes(content)
    script = """
import os, signal, sys
from qedfuse.check import checker
from qedfuse.cli.qedimg.main import main
real = checker._Checker.read_l2
async def read_l2(self, progress):
    os.kill(os.getpid(), signal.SIGINT)
    await real(self, progress)
checker._Checker.read_l2 = read_l2
sys.exit(main(sys.argv[1:]))
"""
    code, output, complaint = finish(
        start([sys.executable, "-c", script, "check", "-r", "all", str(path)])
    )
    assert (code, output) == (130, "")
    assert complaint.count("\n") <= 1
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--dry-run IMAGE", "--dry-run: expected -r as well"),
        ("--force IMAGE", "--force: expected -r as well"),
        ("-U -r all IMAGE", "-U: a repair needs an image that no other program has open"),
        ("-r most IMAGE", "invalid choice: 'most'"),
        ("gone", "gone: cannot open: No such file or directory"),
        (".", "found a directory, expected a regular file"),
        ("text", "not a QED image"),
        ("IMAGE IMAGE", "unrecognized arguments"),
    ],
)
def test_mistakes_get_one_line(
    words: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A usage error prints one line and exits with 1, as qemu-img does."""
    monkeypatch.chdir(tmp_path)
    qemu.create("image.qed", 1 << 20)
    (tmp_path / "text").write_text("no image" * 20, encoding="utf-8")
    assert main(["check", *words.replace("IMAGE", "image.qed").split()]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert expected in said.err


def test_beside_a_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image in use is checked only with -U and never repaired."""
    path = tmp_path / "image.qed"
    qemu.create(path, 1 << 20)
    with qemu.hold(path):
        assert main(["check", str(path)]) == 1
        assert "in use" in capsys.readouterr().err
        assert main(["check", "-U", str(path)]) == 0
        assert main(["check", "-r", "all", str(path)]) == 1
    capsys.readouterr()
    with qemu.hold(path, read_only=True):
        assert main(["check", str(path)]) == 0
    assert "sound" in capsys.readouterr().out


def test_an_overlay_is_checked_without_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a check nor a repair opens the backing file."""
    path = tmp_path / "image.qed"
    content = build_image(64 * CLUSTER_BYTES, {0: b"a", 1: 2}, table_size=2, backing=b"/dev/zero")
    path.write_bytes(content)
    code, found = check(path, "-r", "all", capsys=capsys)
    assert (code, found["corruptions-fixed"]) == (0, 1)
    assert get_entry(path.read_bytes(), l2_entry_offset(content, 1)) == ZERO


@pytest.mark.parametrize("call", ["fstatvfs", "dup"])
def test_a_refusal_of_the_host_during_a_repair_names_the_image(
    call: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system call that fails during a repair is one line with the image's name."""
    path = tmp_path / "image.qed"
    content = build_image(64 * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(5)})
    if call == "fstatvfs":
        put_entry(content, l2_entry_offset(content, 2), 1 << 40)
    path.write_bytes(content + bytes(CLUSTER_BYTES))

    def refuse(_fd: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, call, refuse)
    assert main(["check", "-q", "-r", "all", str(path)]) == 1
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert said.startswith(f"qedimg: {path}: ")
    assert said.endswith(": Too many open files\n")
    assert said.count("\n") == 1


def test_a_host_without_space_for_the_backup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repair whose backup needs more space than the host has is refused before any change."""
    host = tmp_path / "host"
    host.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", host], check=True)
    try:
        path = host / "image.qed"
        clusters = {number * 8192: b"x" for number in range(5)}
        content = build_image(5 * 8192 * CLUSTER_BYTES, clusters, table_size=16)
        for number in clusters:
            for entry in (1, 8191):
                put_entry(content, l2_entry_offset(content, number + entry), 1 << 50)
        path.write_bytes(content)
        assert main(["check", "-q", "-r", "all", str(path)]) == 1
        said = capsys.readouterr().err
        assert re.search(
            r"found [0-9]+ KiB free .*, expected 1\.[0-9]+ MiB for the repair and", said
        )
        assert path.read_bytes() == content
        assert os.listdir(host) == ["image.qed"]  # noqa: PTH208  names
        subprocess.run(["mount", "-o", "remount,size=8M", host], check=True)
        assert main(["check", "-q", "-r", "all", str(path)]) == 0
        backup = (host / "image.qed.before-repair").stat().st_size
        assert 1 << 20 < backup < 2 << 20
    finally:
        subprocess.run(["umount", host], check=True)


def test_a_host_without_space_for_copies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repair that needs more space than the host has is refused before any change."""
    host = tmp_path / "host"
    host.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", host], check=True)
    try:
        path = host / "image.qed"
        content = build_image(4 << 20, dict.fromkeys(range(300), b"x"))
        for number in range(150, 300):
            first = get_entry(content, l2_entry_offset(content, number - 150))
            put_entry(content, l2_entry_offset(content, number), first)
        path.write_bytes(content)
        ballast = (host / "ballast").open("wb")
        with ballast:
            ballast.write(bytes((3 << 20) - len(content) - (300 << 10)))
        assert main(["check", "-q", "-r", "all", str(path)]) == 1
        said = capsys.readouterr().err
        assert "not repaired: found 300" in said
        assert " KiB free on the host, expected 6" in said
        assert " KiB for the repair and its backup" in said
        assert said.count("\n") == 1
        assert path.read_bytes() == content
        assert sorted(os.listdir(host)) == ["ballast", "image.qed"]  # noqa: PTH208  names
        (host / "ballast").unlink()
        assert main(["check", "-q", "-r", "all", str(path)]) == 3
    finally:
        subprocess.run(["umount", host], check=True)
