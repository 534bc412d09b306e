"""Each claim of docs/qemu-differences.md about QEMU is true of the QEMU that is installed.

Each test is one row, or several rows that one image shows; rows about qedfuse are tested
elsewhere.  Where QEMU's versions differ, the test says from which one on.
"""

from __future__ import annotations

import functools
import json
import re
import signal
import subprocess
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.ondisk.constants import ZERO, Feature
from tests.support import qemu
from tests.support.disks import build_image, get_entry, header_of, l2_entry_offset, put_entry

if TYPE_CHECKING:
    from pathlib import Path

MIB: Final = 1 << 20
CLUSTER_BYTES: Final = 4096
TABLES: Final = 2
"""Clusters in a table; QEMU refuses images with one (see below)."""


@functools.cache
def version() -> tuple[int, int]:
    """Return QEMU's version."""
    found = re.search(r"version (\d+)\.(\d+)", qemu.run("qemu-img", "--version").stdout)
    assert found is not None
    return int(found[1]), int(found[2])


def fails(*command: str | Path) -> str:
    """Run a command that must fail, and not by a signal; give its output."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=qemu.TIMEOUT, check=False
    )
    assert done.returncode > 0, done
    return done.stdout + done.stderr


def image(path: Path, clusters: dict[int, bytes | int], **fields: int | bytes) -> Path:
    """Build an image of 1 MiB in clusters of 4 KiB."""
    content = build_image(MIB, clusters, table_size=TABLES, **fields)  # type: ignore[arg-type]
    path.write_bytes(content)
    return path


def entry(path: Path, number: int) -> int:
    """Read the entry of a guest cluster."""
    content = path.read_bytes()
    return get_entry(content, l2_entry_offset(content, number))


def features(path: Path) -> int:
    """Read the incompatible feature bits."""
    return header_of(path.read_bytes()).features


DATA: Final = b"\x55" * CLUSTER_BYTES


# Content of the disk


def test_a_write_into_a_zero_cluster_brings_the_base_back(tmp_path: Path) -> None:
    """A partial write into a zero cluster fills the rest of the cluster from the base."""
    base = image(tmp_path / "base.qed", {0: DATA})
    top = image(tmp_path / "top.qed", {0: ZERO}, backing=base.name.encode())
    qemu.io(top, "read -P 0 0 4k", "write -P 1 0 512")
    qemu.io(top, "read -P 1 0 512", "read -P 0x55 512 3584")


def test_only_the_first_cluster_of_a_request_is_checked_against_the_end(tmp_path: Path) -> None:
    """Clusters past the end of the file read as zeros if the request begins before the end."""
    path = image(tmp_path / "a.qed", {0: DATA, 1: DATA, 2: DATA})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 2 * CLUSTER_BYTES)
    qemu.io(path, "read -P 0x55 0 4k", "read -P 0 -s 4k -l 8k 0 12k", read_only=True)
    with pytest.raises(qemu.QemuError, match="Invalid argument"):
        qemu.io(path, "read 4k 4k", read_only=True)


def test_a_bad_entry_fails_the_whole_request(tmp_path: Path) -> None:
    """A request with a bad entry fails as a whole, good clusters included."""
    path = image(tmp_path / "a.qed", {0: DATA, 1: 1 << 40})
    qemu.io(path, "read -P 0x55 0 4k", read_only=True)
    with pytest.raises(qemu.QemuError, match="Invalid argument"):
        qemu.io(path, "read 0 8k", read_only=True)


# Space


def test_discards_do_nothing(tmp_path: Path) -> None:
    """Discards succeed and change neither tables nor file nor content."""
    path = image(tmp_path / "a.qed", {0: DATA})
    before = path.read_bytes()
    qemu.io(path, "discard 0 4k")
    assert path.read_bytes() == before


def test_write_zeroes_keeps_allocated_clusters(tmp_path: Path) -> None:
    """Write-zeroes with leave to unmap writes zeros into the allocated data cluster."""
    path = image(tmp_path / "a.qed", {0: DATA})
    offset = entry(path, 0)
    qemu.io(path, "write -z -u 0 4k")
    assert entry(path, 0) == offset
    assert path.read_bytes()[offset : offset + CLUSTER_BYTES] == bytes(CLUSTER_BYTES)


def test_leaked_clusters_are_never_used(tmp_path: Path) -> None:
    """A new cluster comes from the end of the file, also after a repair of leaks."""
    path = image(tmp_path / "a.qed", {0: DATA, 1: DATA})
    content = bytearray(path.read_bytes())
    put_entry(content, l2_entry_offset(content, 0), 0)
    path.write_bytes(content)
    qemu.check(path, repair="leaks")
    length = path.stat().st_size
    qemu.io(path, "write 8k 4k")
    assert entry(path, 2) == length


def test_a_write_that_fails_leaks_its_cluster(tmp_path: Path) -> None:
    """A write that fails leaks its cluster, and the next write takes another."""
    path = image(tmp_path / "a.qed", {0: DATA})
    length = path.stat().st_size
    fault = {"event": "write_aio", "errno": 28, "once": True}
    file = {"driver": "file", "filename": str(path)}
    node = {"driver": "qed", "file": {"driver": "blkdebug", "image": file, "inject-error": [fault]}}
    words = ("-c", "write 4k 4k", "-c", "write 8k 4k", f"json:{json.dumps(node)}")
    assert "No space left" in fails("qemu-io", *words)
    assert entry(path, 1) == 0
    assert entry(path, 2) == length + CLUSTER_BYTES


def test_a_list_of_free_clusters_is_refused(tmp_path: Path) -> None:
    """An image with a persistent free list, feature bit 60, is refused."""
    path = image(tmp_path / "a.qed", {}, features=Feature.FREE_LIST)
    assert "Unsupported QED features: 1000000000000000" in fails("qemu-img", "info", path)


# Opening and locking


def test_opening_for_writing_repairs_silently(tmp_path: Path) -> None:
    """Opening an unclean image clears bad entries and NEED_CHECK without a message."""
    path = image(tmp_path / "a.qed", {0: DATA, 1: 1 << 40, 2: 7}, features=Feature.NEED_CHECK)
    content = bytearray(path.read_bytes())
    put_entry(content, l2_entry_offset(content, 2), entry(path, 0))
    path.write_bytes(content)
    said = qemu.io(path, "read 0 512")
    assert "repair" not in said.lower()
    assert entry(path, 1) == 0
    assert entry(path, 0) == entry(path, 2)
    assert not features(path) & Feature.NEED_CHECK


@pytest.mark.parametrize("overlay", [False, True])
def test_overlays_never_get_need_check(tmp_path: Path, overlay: bool) -> None:  # noqa: FBT001
    """An image without a backing file has NEED_CHECK while it is written to, an overlay never."""
    base = image(tmp_path / "base.qed", {})
    fields = {"backing": base.name.encode()} if overlay else {}
    path = image(tmp_path / "a.qed", {}, **fields)
    with qemu.hold(path) as held:
        held.command("write 0 4k")
        assert bool(features(path) & Feature.NEED_CHECK) is not overlay


def test_a_raw_base_is_not_locked_against_writers(tmp_path: Path) -> None:
    """A raw base can be changed below an overlay that is in use."""
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(MIB))
    path = qemu.create(tmp_path / "a.qed", backing=base, backing_format="raw")
    with qemu.hold(path) as held:
        held.command("write 0 4k")
        with base.open("r+b") as file:
            file.write(DATA)
        qemu.io(base, "write 0 4k", image_format="raw")


def test_a_base_that_names_itself_is_followed(tmp_path: Path) -> None:
    """An image that is its own base is opened again and again until no file can be opened."""
    path = image(tmp_path / "a.qed", {}, backing=b"a.qed")
    said = fails(
        "sh", "-c", 'ulimit -n 64; exec "$@"', "sh", "qemu-io", "-r", "-c", "read 0 1", path
    )
    assert "Too many open files" in said


def test_a_base_may_be_anything(tmp_path: Path) -> None:
    """A backing name may be a json: specification of a file elsewhere."""
    (tmp_path / "secret").write_bytes(DATA)
    (tmp_path / "images").mkdir()
    name = json.dumps(
        {"driver": "raw", "file": {"driver": "file", "filename": f"{tmp_path}/secret"}}
    )
    path = image(tmp_path / "images" / "a.qed", {}, backing=b"json:" + name.encode())
    qemu.io(path, "read -P 0x55 0 4k", read_only=True)


# check


def test_check_needs_the_base(tmp_path: Path) -> None:
    """A check fails if the base cannot be opened."""
    path = image(tmp_path / "a.qed", {}, backing=b"gone.qed")
    assert "gone.qed" in fails("qemu-img", "check", path)


@pytest.mark.parametrize("way", ["leaks", "all"])
def test_a_repair_clears_entries_and_leaves_leaks(tmp_path: Path, way: str) -> None:
    """Both kinds of repair clear bad entries, so that the base shows; leaks and duplicates stay."""
    base = image(tmp_path / "base.qed", dict.fromkeys(range(5), b"\x66" * CLUSTER_BYTES))
    clusters: dict[int, bytes | int] = {0: DATA, 1: 1 << 40, 2: DATA, 3: DATA}
    path = image(tmp_path / "a.qed", clusters, backing=base.name.encode())
    content = bytearray(path.read_bytes())
    put_entry(content, l2_entry_offset(content, 2), entry(path, 0))
    path.write_bytes(content)
    length = path.stat().st_size
    found = qemu.check(path, repair=way)
    assert found.data["corruptions-fixed"] >= 1
    assert entry(path, 1) == 0
    assert entry(path, 0) == entry(path, 2)
    assert path.stat().st_size == length
    assert qemu.check(path).leaks
    qemu.io(path, "read -P 0x66 4k 4k", read_only=True)


def test_check_ignores_header_oddities(tmp_path: Path) -> None:
    """Data past the disk's end, unknown bits, NEED_CHECK and header_size 0 are no findings."""
    path = image(tmp_path / "a.qed", {0: DATA, 300: DATA}, compat=4, autoclear=8)
    done = qemu.check(path)
    assert (done.code, done.errors, done.leaks) == (0, 0, 0)
    path = image(tmp_path / "b.qed", {0: DATA}, features=Feature.NEED_CHECK)
    assert qemu.check(path).code == 0
    path = image(tmp_path / "c.qed", {0: DATA}, features=Feature.BACKING_FORMAT_NO_PROBE)
    assert qemu.check(path).code == 0
    path = image(tmp_path / "d.qed", {0: DATA}, features=Feature.BACKING_FILE)  # an empty name
    assert qemu.check(path).code == 0
    content = bytearray(path.read_bytes())
    content[12:16] = bytes(4)  # header_size
    path.write_bytes(content)
    assert qemu.check(path).errors == 0


def test_a_table_within_the_l1_table_is_read(tmp_path: Path) -> None:
    """An L2 table that overlaps the L1 table is read, which gives an error for each entry."""
    path = image(tmp_path / "a.qed", {0: DATA})
    content = bytearray(path.read_bytes())
    header = header_of(content)
    put_entry(content, header.l1_table_offset + 8, header.l1_table_offset)
    path.write_bytes(content)
    assert qemu.check(path).code != 0


@pytest.mark.parametrize(("missing", "code"), [(511, 0), (512, 2)])
def test_a_last_cluster_that_lacks_less_than_a_sector(
    tmp_path: Path, missing: int, code: int
) -> None:
    """A last cluster that lacks less than a sector is accepted."""
    path = image(tmp_path / "a.qed", {0: DATA})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - missing)
    assert qemu.check(path).code == code


# create


def test_create_replaces(tmp_path: Path) -> None:
    """An existing file is replaced without a question."""
    path = tmp_path / "a.qed"
    path.write_bytes(b"somebody's")
    assert qemu.info(qemu.create(path, MIB))["format"] == "qed"


@pytest.mark.parametrize(
    ("options", "works"),
    [
        ("cluster_size=2M", True),
        ("cluster_size=4M", False),
        ("cluster_size=64M,table_size=1", False),
        ("cluster_size=64M,table_size=2", False),
        ("cluster_size=64M,table_size=16", False),
        ("preallocation=full", True),
    ],
)
def test_geometries_that_create_takes(tmp_path: Path, options: str, works: bool) -> None:  # noqa: FBT001
    """Clusters of 4 MiB or more are refused, because the largest disk size overflows."""
    command = ("qemu-img", "create", "-q", "-f", "qed", "-o", options, tmp_path / "a.qed", "1M")
    if works:
        qemu.run(*command)
        assert not [item for item in qemu.map_extents(tmp_path / "a.qed") if item["data"]]
    else:
        fails(*command)


def test_tables_of_one_cluster(tmp_path: Path) -> None:
    """An image with tables of one cluster is created but not opened."""
    path = qemu.create(tmp_path / "a.qed", MIB, table_size=1)
    fails("qemu-img", "info", path)


@pytest.mark.parametrize(("length", "opens"), [(1024, True), (4095, True), (4096, False)])
def test_length_of_the_name_of_a_base(tmp_path: Path, length: int, *, opens: bool) -> None:
    """A name of any length is stored, but an image with one of more than 4095 bytes not opened."""
    path = tmp_path / "a.qed"
    name = "n" * length
    qemu.run("qemu-img", "create", "-q", "-u", "-f", "qed", "-b", name, "-F", "raw", path, "1M")
    assert header_of(path.read_bytes()[:64]).backing_filename_size == length
    if opens:
        assert qemu.info(path)["backing-filename"] == name
    else:
        assert "backing filename" in fails("qemu-img", "info", path)


def test_a_base_needs_its_format(tmp_path: Path) -> None:
    """-b demands -F, also for a QED base."""
    base = image(tmp_path / "base.qed", {})
    assert "format" in fails("qemu-img", "create", "-f", "qed", "-b", base, tmp_path / "a.qed")


# info and map


def test_info_does_not_show_need_check(tmp_path: Path) -> None:
    """The dirty flag is false with NEED_CHECK, and the base is opened only for the whole chain."""
    path = image(tmp_path / "a.qed", {}, features=Feature.NEED_CHECK)
    assert qemu.info(path)["dirty-flag"] is False
    fails("qemu-img", "info", "--backing-chain", image(tmp_path / "b.qed", {}, backing=b"gone"))
    assert qemu.info(tmp_path / "b.qed")["backing-filename"] == "gone"


def test_keys_that_newer_versions_have(tmp_path: Path) -> None:
    """The key ``children`` exists from 8.0 on, ``compressed`` from 8.2 on."""
    path = image(tmp_path / "a.qed", {})
    assert ("children" in qemu.info(path)) is (version() >= (8, 0))
    assert ("Child node" in qemu.run("qemu-img", "info", path).stdout) is (version() >= (8, 0))
    assert ("compressed" in qemu.map_extents(path)[0]) is (version() >= (8, 2))


def test_a_bad_entry_ends_the_map(tmp_path: Path) -> None:
    """A bad entry ends the map, and nothing is listed."""
    path = image(tmp_path / "a.qed", {0: DATA, 1: 1 << 40})
    assert "start" not in fails("qemu-img", "map", "--output=json", path)


def test_a_run_of_4_gib_aborts_map(tmp_path: Path) -> None:
    """A run of 4 GiB in one table aborts the map."""
    cluster, count = 65536, 1 << 16
    content = build_image(8 << 30, {0: DATA}, cluster_size=cluster, table_size=8)
    first, table = len(content), l2_entry_offset(content, 0)
    entries = (first + number * cluster for number in range(count))
    content[table : table + 8 * count] = b"".join(value.to_bytes(8, "little") for value in entries)
    path = tmp_path / "a.qed"
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(first + count * cluster)
    command = ("qemu-img", "map", path)
    done = subprocess.run(command, capture_output=True, timeout=qemu.TIMEOUT, check=False)
    assert done.returncode == -signal.SIGABRT


# compare, measure, resize, rebase, commit


def test_compare_shows_the_sector(tmp_path: Path) -> None:
    """Compare reports the offset of the sector that differs, not of the byte."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(bytes(4096))
    second.write_bytes(bytes(1000) + b"x" + bytes(3095))
    said = fails("qemu-img", "compare", "-f", "raw", "-F", "raw", first, second)
    assert re.search(r"offset 512\b", said)


def test_operations_that_qemu_lacks_for_qed(tmp_path: Path) -> None:
    """Measure, shrinking, preallocation and growing over a longer base are not supported."""
    path = image(tmp_path / "a.qed", {0: DATA})
    assert "does not support" in fails("qemu-img", "measure", "-O", "qed", path)
    fails("qemu-img", "resize", "--shrink", path, "512k")
    fails("qemu-img", "resize", "--preallocation=full", path, "2M")
    base = image(tmp_path / "base.qed", {0: DATA, 255: DATA})
    top = qemu.create(tmp_path / "top.qed", MIB // 2, backing=base)
    fails("qemu-img", "resize", top, "1M")


def test_data_past_the_end_appears_after_growing(tmp_path: Path) -> None:
    """Data past the disk's end becomes visible when the disk grows."""
    path = image(tmp_path / "a.qed", {300: DATA})
    qemu.run("qemu-img", "resize", path, "2M")
    qemu.io(path, f"read -P 0x55 {300 * CLUSTER_BYTES} 4k", read_only=True)


def test_rebase_refuses_unknown_compat_bits(tmp_path: Path) -> None:
    """Rebase refuses unknown compatible bits, which a program should ignore."""
    base = image(tmp_path / "base.qed", {})
    path = image(tmp_path / "a.qed", {}, compat=4)
    fails("qemu-img", "rebase", "-u", "-F", "qed", "-b", base, path)


def test_commit_leaves_the_overlay(tmp_path: Path) -> None:
    """Commit keeps the overlay's data, and zeros free no cluster of the base."""
    base = image(tmp_path / "base.qed", {0: DATA, 1: DATA})
    top = image(
        tmp_path / "top.qed", {0: b"\x66" * CLUSTER_BYTES, 1: ZERO}, backing=base.name.encode()
    )
    before, offset = top.read_bytes(), entry(base, 1)
    qemu.run("qemu-img", "commit", "-q", top)
    assert top.read_bytes() == before
    assert entry(base, 1) == offset
    qemu.io(base, "read -P 0x66 0 4k", "read -P 0 4k 4k", read_only=True)


def test_commit_grows_no_overlay(tmp_path: Path) -> None:
    """Commit fails if the base is an overlay and shorter."""
    image(tmp_path / "lowest.qed", {0: DATA, 255: DATA})
    middle = qemu.create(tmp_path / "middle.qed", MIB // 2, backing=tmp_path / "lowest.qed")
    top = qemu.create(tmp_path / "top.qed", MIB, backing=middle)
    qemu.io(top, "write 768k 4k")
    fails("qemu-img", "commit", top)
