"""A repair loses nothing permanently: clusters that it drops stay, and it can be undone."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from typing import TYPE_CHECKING, Final

import pytest
import trio

from qedfuse.cli.qedimg.main import main
from qedfuse.errors import QedError
from qedfuse.ondisk.constants import Feature
from qedfuse.tools.repair.backup import Backup
from qedfuse.tools.repair.undo import undo_repair
from tests.check.test_repair_keeps_data import damaged
from tests.support import qemu
from tests.support.disks import (
    build_image,
    get_entry,
    guest_bytes,
    header_of,
    l2_entry_offset,
    pattern,
    put_entry,
)
from tests.support.freelists import put_list
from tests.support.hostfiles import RecordingFile
from tests.support.sandbox import ROOT
from tests.support.share import share

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.hostio.hostfile import Buffer

CLUSTER_BYTES: Final = 4096
ENTRIES: Final = 2 * CLUSTER_BYTES // 8


def two_tables() -> bytearray:
    """Build an image of two full tables with 300 clusters each."""
    numbers = [*range(300), *range(ENTRIES, ENTRIES + 300)]
    return build_image(
        2 * ENTRIES * CLUSTER_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in numbers}, table_size=2
    )


def test_one_flipped_bit_costs_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Clusters of a cleared L1 entry stay in the file until -r leaks, and --undo restores them."""
    path, backup = tmp_path / "an image.qed", tmp_path / "an image.qed.before-repair"
    content = two_tables()
    entry_offset = header_of(content).l1_table_offset + 8
    content[entry_offset + 4] ^= 1
    path.write_bytes(content)
    assert main(["check", "-r", "all", "--dry-run", str(path)]) == 2
    assert "leaked space would stay" in capsys.readouterr().out

    assert main(["check", "-r", "all", str(path)]) == 3
    said = capsys.readouterr().out
    assert "leaked space stays, because a bad entry may have pointed to it" in said
    assert f"qedimg check -r leaks '{path}'\n" in said
    after = path.read_bytes()
    assert after[header_of(content).l1_end :] == content[header_of(content).l1_end :]
    assert get_entry(after, entry_offset) == 0
    # Running it again does not confirm the repair.
    assert main(["check", "--output", "json", "-r", "all", str(path)]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["repair"]["leaks-kept"] is True
    assert found["leaks"] == 302
    assert path.read_bytes() == after

    assert main(["check", "--undo", str(backup), str(path)]) == 2
    assert "restored: 2 ranges; the file had" in capsys.readouterr().out
    assert path.read_bytes() == content
    path.write_bytes(after)
    assert main(["check", "-q", "-r", "leaks", str(path)]) == 0
    assert path.stat().st_size == len(content) - 302 * CLUSTER_BYTES
    assert guest_bytes(path.read_bytes()) == guest_bytes(after)
    assert main(["check", "--undo", str(backup), str(path)]) == 1
    assert "nothing was restored: file size: found" in capsys.readouterr().err
    assert main(["check", "-q", str(path)]) == 0


def test_the_cluster_of_a_repaired_entry_stays(tmp_path: Path) -> None:
    """The cluster of a cleared L2 entry is leaked, and not freed."""
    path = tmp_path / "image.qed"
    content = two_tables()
    content[l2_entry_offset(content, 5) + 5] ^= 1
    path.write_bytes(content)
    assert main(["check", "-q", "-r", "all", str(path)]) == 3
    assert path.stat().st_size == len(content)
    assert qemu.check(path).leaks == 1


def saved_and_repaired(tmp_path: Path, content: bytes | bytearray) -> tuple[Path, Path]:
    """Repair an image with the command; return the image and the backup."""
    path = tmp_path / "image.qed"
    path.write_bytes(content)
    assert main(["check", "-q", "-r", "all", "--force", str(path)]) in (0, 3)
    return path, tmp_path / "image.qed.before-repair"


@pytest.mark.parametrize("seed", range(share(12, of=40)))
def test_any_repair_can_be_undone(seed: int, tmp_path: Path) -> None:
    """After an undo of the repair of random damage every byte is as before."""
    content = damaged(random.Random(seed), b"base.raw" if seed % 2 else b"")
    path, backup = saved_and_repaired(tmp_path, content)
    if not backup.exists():
        return  # no error
    main(["check", "-q", "--undo", str(backup), str(path)])
    assert path.read_bytes() == content
    assert main(["check", "-q", "--undo", str(backup), str(path)]) == main(
        ["check", "-q", str(path)]
    )
    assert path.read_bytes() == content


def test_the_header_and_a_dropped_list_are_restored(tmp_path: Path) -> None:
    """Feature bits, autoclear bits and the descriptor of the free list are restored."""
    content = two_tables()
    put_entry(content, l2_entry_offset(content, 299), 0)
    put_list(content)
    struct.pack_into("<Q", content, 32, 1 << 40)
    put_entry(content, l2_entry_offset(content, 3), 1 << 50)
    assert header_of(content).has_free_list
    path, backup = saved_and_repaired(tmp_path, content)
    assert not header_of(path.read_bytes()).has_free_list
    assert main(["check", "-q", "--undo", str(backup), str(path)]) == 2
    assert path.read_bytes() == content


def undo_in_memory(content: bytes | bytearray, backup: Path) -> RecordingFile:
    """Undo a repair in memory; return the file with its changes."""

    async def work() -> RecordingFile:
        file = RecordingFile(content)
        await undo_repair(file, str(backup))
        return file

    return trio.run(work)


@pytest.mark.parametrize("seed", range(12))
def test_an_interrupted_undo_can_be_repeated(seed: int, tmp_path: Path) -> None:
    """A crash during an undo leaves NEED_CHECK, and a second undo has the same result."""
    chance = random.Random(seed)
    content = damaged(chance)
    path, backup = saved_and_repaired(tmp_path, content)
    if not backup.exists():
        return
    repaired = path.read_bytes()
    file = undo_in_memory(repaired, backup)
    assert file.content == content
    states = [bytearray(state) for _number, state in file.prefixes()]
    states += [file.power_loss(count, chance) for count in range(len(file.changes) + 1)]
    for state in states:
        assert header_of(state).need_check or state in (content, repaired)
        assert undo_in_memory(state, backup).content == content


def test_undo_refuses_a_changed_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An undo of a changed image, or with a damaged backup, is one line and no write."""
    content = two_tables()
    put_entry(content, l2_entry_offset(content, 3), 1 << 50)
    put_entry(content, l2_entry_offset(content, 8), 1 << 50)
    path, backup = saved_and_repaired(tmp_path, content)
    repaired, lines = bytearray(path.read_bytes()), backup.read_bytes().splitlines(keepends=True)

    def refused(image: Buffer, saved: bytes, expected: str) -> None:
        path.write_bytes(image)
        backup.write_bytes(saved)
        assert main(["check", "--undo", str(backup), str(path)]) == 1
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert expected in said.err
        assert path.read_bytes() == image

    written = repaired.copy()
    put_entry(written, l2_entry_offset(content, 5), 7 * CLUSTER_BYTES)
    refused(written, b"".join(lines), "the image has changed since the repair")
    larger = repaired.copy()
    struct.pack_into("<Q", larger, 48, CLUSTER_BYTES)
    refused(larger, b"".join(lines), "header: found other values than in the backup, expected")
    for field, bit in (
        (16, Feature.BACKING_FORMAT_NO_PROBE),
        (16, Feature.FREE_LIST),
        (32, 1 << 40),
    ):
        other = repaired.copy()
        struct.pack_into("<Q", other, field, bit)
        refused(other, b"".join(lines), "header: found other values than in the backup, expected")
    refused(repaired + bytes(CLUSTER_BYTES), b"".join(lines), "file size: found")
    first, rest = lines[0], lines[1:]
    for saved in (
        lines[:-1],
        [*lines[:-2], lines[-1]],
        [first, b"8 00\n", *rest],
        [first, b"\xff \xff \xff\n"],
        [first, b"\n", *rest],
        [first],
    ):
        refused(repaired, b"".join(saved), "incomplete or damaged backup")
    refused(repaired, b"".join(lines[1:]), "expected the backup of a repair")


def test_undo_keeps_the_declaration_of_a_raw_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An undo is refused after a rebase, and does not let the base be probed again."""
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    content = build_image(1 << 20, {3: b"x", 8: b"y"}, backing=b"base.raw")
    put_entry(content, l2_entry_offset(content, 3), 1 << 50)
    assert not header_of(content).backing_is_raw
    path, backup = saved_and_repaired(tmp_path, content)
    assert main(["rebase", "-q", "-u", "-b", "base.raw", "-F", "raw", str(path)]) == 0
    before = path.read_bytes()
    assert header_of(before).backing_is_raw
    capsys.readouterr()
    assert main(["check", "--undo", str(backup), str(path)]) == 1
    assert "nothing was restored: header: found other values" in capsys.readouterr().err
    assert path.read_bytes() == before


def forged(image: bytes, *ranges: bytes, lengths: str = "") -> bytes:
    """Return a backup of ``image`` with the header and other ranges, which are lines."""
    header = image[:64].hex()
    lines = [b"qedimg-check-backup 1", f"0 {header} {header}".encode(), *ranges]
    lengths = lengths or f"{len(image)} {len(image)}"
    return b"\n".join([*lines, f"complete {1 + len(ranges)} {lengths}\n".encode()])


L1: Final = CLUSTER_BYTES  # the table has two clusters
LINE: Final = b"%d " % L1 + b"00" * 8 + b" " + b"00" * 8


@pytest.mark.parametrize(
    ("ranges", "lengths", "expected"),
    [
        ([], "100 999999999", "(table of 8192 bytes), expected a whole table inside the file of"),
        ([], "64 999999999", "(table of 8192 bytes), expected a whole table inside the file of"),
        ([], "63 999999999", "found lengths of 63 and 999999999 bytes, expected ascending ones"),
        ([], "999999999 100", "found lengths of 999999999 and 100 bytes, expected ascending ones"),
        ([], f"{3 * CLUSTER_BYTES} 999999999", "expected 12288 or 999999999 bytes"),
        ([], f"{3 * CLUSTER_BYTES} {1 << 64}", "an incomplete or damaged backup"),
        ([LINE], "4100 999999999", "of at least 4104 bytes, the end of the last range"),
        ([LINE, LINE], "", "found overlapping ranges at 4096 and 4096, expected separate ones"),
        ([b"4104 " + LINE[5:], LINE[:-17] + b"00" * 8 + LINE[-17:] + b"00" * 8], "", "overlapping"),
        ([b"4099 " + LINE[5:]], "", "found a range of 8 bytes at 4099, expected one after"),
        ([b"56 " + LINE[5:]], "", "found a range of 8 bytes at 56, expected one after the header"),
        ([b"4096 00 00"], "", "found a range at 4096 that ends within an entry, expected whole"),
        ([b"%d 00 00" % ((1 << 63) - 8)], "", "of at least 9223372036854775801 bytes"),
        ([b"%d 00 00" % (1 << 63)], "", "an incomplete or damaged backup"),
        ([b"-8 00 00"], "", "an incomplete or damaged backup"),
        ([b"4_096 " + LINE[5:]], "", "an incomplete or damaged backup"),
        ([b"4096  "], "", "an incomplete or damaged backup"),
    ],
)
def test_a_forged_backup_changes_nothing(
    ranges: list[bytes],
    lengths: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ranges and lengths that no repair saves are refused in one line before the image changes."""
    path, backup = tmp_path / "image.qed", tmp_path / "backup"
    image = bytes(two_tables())
    path.write_bytes(image)
    backup.write_bytes(forged(image, *ranges, lengths=lengths))
    assert main(["check", "--undo", str(backup), str(path)]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert expected in said.err
    assert path.read_bytes() == image


def test_a_backup_must_begin_with_the_header(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backup without ranges, or whose first range is not the header, is refused."""
    path, backup = tmp_path / "image.qed", tmp_path / "backup"
    image = bytes(two_tables())
    path.write_bytes(image)
    for lines, expected in (
        (b"complete 0 100 999999999\n", "found no range, expected the header as the first range"),
        (LINE + b"\ncomplete 1 100 999999999\n", "found a first range of 8 bytes at 4096"),
        (b"0 00 00\ncomplete 1 100 999999999\n", "found a first range of 1 bytes at 0"),
    ):
        backup.write_bytes(b"qedimg-check-backup 1\n" + lines)
        assert main(["check", "--undo", str(backup), str(path)]) == 1
        assert expected in capsys.readouterr().err
        assert path.read_bytes() == image


def test_a_forged_backup_that_is_like_a_real_one_is_accepted(tmp_path: Path) -> None:
    """The forged backups of the tests above are refused only for what is wrong in them."""
    path, backup = tmp_path / "image.qed", tmp_path / "backup"
    image = bytes(two_tables())
    path.write_bytes(image)
    entry = image[L1 : L1 + 8].hex().encode()
    backup.write_bytes(forged(image, b"%d %s %s" % (L1, entry, entry)))
    assert main(["check", "-q", "--undo", str(backup), str(path)]) == 0
    assert path.read_bytes() == image


def test_a_backup_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An I/O error of the backup is reported with the backup's name, and nothing is restored."""
    path = tmp_path / "image.qed"
    content = two_tables()
    path.write_bytes(content)
    # Address 0 of a process is not mapped, so reading this file from its beginning fails.
    assert main(["check", "--undo", "/proc/self/mem", str(path)]) == 1
    assert capsys.readouterr().err == "qedimg: /proc/self/mem: read: Input/output error\n"
    assert path.read_bytes() == content


def test_undo_refuses_another_image(tmp_path: Path) -> None:
    """A backup is refused for an image with another header or other tables."""
    content = two_tables()
    put_entry(content, l2_entry_offset(content, 3), 1 << 50)
    _path, backup = saved_and_repaired(tmp_path, content)
    other = build_image(2 * ENTRIES * CLUSTER_BYTES, {3: b"x"}, table_size=2)
    with pytest.raises(QedError, match="nothing was restored"):
        undo_in_memory(other, backup)


@pytest.mark.parametrize("words", [["-r", "all"], ["-U"]])
def test_undo_excludes_other_options(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--undo with -r or -U is a usage error."""
    assert main(["check", *words, "--undo", "file", str(tmp_path / "image.qed")]) == 1
    assert capsys.readouterr().err.count("--undo: expected neither -r nor -U") == 1


def test_a_repair_that_was_killed_is_not_taken_for_none(tmp_path: Path) -> None:
    """A repair repeated after a kill keeps the leaks if its backup exists."""
    path, backup = tmp_path / "image.qed", tmp_path / "image.qed.before-repair"
    content = two_tables()
    put_entry(content, header_of(content).l1_table_offset + 8, 0)
    content[16] |= Feature.NEED_CHECK
    path.write_bytes(content)
    backup.write_bytes(b"")
    assert main(["check", "-q", "-r", "all", str(path)]) == 3
    assert path.stat().st_size == len(content)
    assert not header_of(path.read_bytes()).need_check
    backup.unlink()
    assert main(["check", "-q", "-r", "all", str(path)]) == 0
    assert path.stat().st_size < len(content)


@pytest.mark.parametrize("first", ["image.qed", "links/link.qed"])
@pytest.mark.parametrize("second", ["image.qed", "links/link.qed", "relative.qed"])
def test_leaks_are_kept_by_every_name(
    first: str, second: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backup lies beside the image, and keeps the leaks, also by a symbolic link to the image."""
    path = tmp_path / "image.qed"
    content = two_tables()
    put_entry(content, l2_entry_offset(content, 3), 1 << 50)
    path.write_bytes(content)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/link.qed").symlink_to(path)
    (tmp_path / "relative.qed").symlink_to("links/link.qed")
    assert main(["check", "-r", "all", str(tmp_path / first)]) == 3
    assert f"changes: {path}.before-repair\n" in capsys.readouterr().out
    before = path.read_bytes()
    assert main(["check", "-q", "-r", "all", str(tmp_path / second)]) == 3
    assert path.read_bytes() == before
    assert main(["check", "-q", "-r", "leaks", str(tmp_path / second)]) == 0
    assert path.stat().st_size < len(before)


def test_leaks_are_kept_by_another_hard_link(tmp_path: Path) -> None:
    """The backup of a repair by another hard link is not found, so leaks count as kept."""
    path, other = tmp_path / "image.qed", tmp_path / "other.qed"
    content = two_tables()
    put_entry(content, l2_entry_offset(content, 3), 1 << 50)
    path.write_bytes(content)
    assert main(["check", "-q", "-r", "all", str(path)]) == 3
    other.hardlink_to(path)
    before = path.read_bytes()
    assert main(["check", "-q", "-r", "all", str(other)]) == 3
    assert path.read_bytes() == before
    path.unlink()
    assert main(["check", "-q", "-r", "all", str(other)]) == 0
    assert other.stat().st_size < len(before)


def test_the_reason_why_leaks_are_kept_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Leaks that only other hard links keep are not explained by a repair, also in a dry run."""
    path, other = tmp_path / "image.qed", tmp_path / "other.qed"
    content = two_tables()
    put_entry(content, l2_entry_offset(content, 3), 0)
    path.write_bytes(content)
    other.hardlink_to(path)
    for words, verb in ((["--dry-run"], "would stay"), ([], "stays")):
        assert main(["check", "-r", "all", *words, str(path)]) == 3
        lines = [line for line in capsys.readouterr().out.splitlines() if verb in line]
        expected = (
            f"leaked space {verb}, because the image has several hard links, and the backup of an "
            "earlier repair may lie beside another one; if the image was never repaired, or you "
            f"are satisfied with the repair, free the space with: qedimg check -r leaks {path}"
        )
        assert lines == [expected]
    assert path.read_bytes() == content
    (tmp_path / "image.qed.before-repair").touch()
    assert main(["check", "-r", "all", str(path)]) == 3
    assert "stays, because a bad entry may have pointed to it" in capsys.readouterr().out


def test_the_documented_format_is_enough(tmp_path: Path) -> None:
    """The script in docs/repair.md undoes a repair without qedimg."""
    content = two_tables()
    put_entry(content, l2_entry_offset(content, 3), 1 << 50)
    put_entry(content, l2_entry_offset(content, 8), get_entry(content, l2_entry_offset(content, 9)))
    path, backup = saved_and_repaired(tmp_path, content)
    assert path.stat().st_size > len(content)
    script = (ROOT / "docs/repair.md").read_text(encoding="utf-8").split("```sh\n")[2]
    script = script.split("```")[0].replace("LENGTH_BEFORE", str(len(content)))
    backup.rename(tmp_path / "damaged.qed.before-repair")
    path.rename(tmp_path / "damaged.qed")
    subprocess.run(["sh", "-euc", script], check=True, cwd=tmp_path)
    assert (tmp_path / "damaged.qed").read_bytes() == content


def test_a_backup_that_cannot_be_removed_does_not_hide_why_the_repair_failed(
    tmp_path: Path,
) -> None:
    """The error of the repair survives, although the incomplete backup has gone already."""
    path = tmp_path / "backup"

    def repair() -> None:
        with Backup(str(path), tmp_path.stat()) as backup:
            backup.save(0, b"old", b"new")
            path.unlink()
            msg = "the repair failed"
            raise QedError(msg)

    with pytest.raises(QedError, match="the repair failed"):
        repair()
