"""``qedimg info`` on images that cannot be opened, and on hostile images."""

from __future__ import annotations

import errno
import json
import os
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from qedfuse.ondisk.header import Header, build_header
from qedfuse.tools.editing.freelist import enable
from qedfuse.tools.inspection.l1summary import MAX_L1_BYTES
from tests.support.disks import build_image, l2_entry_offset, put_entry
from tests.toolbox import memory
from tests.toolbox.test_info import human, info, problems

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

CLUSTER_BYTES = 4096
MIB = 1 << 20

BROKEN: Final[Mapping[str, Mapping[str, int]]] = {
    "bad-cluster-size": {"cluster_size": 4097},
    "bad-table-size": {"table_size": 3},
    "bad-header-size": {"header_size": 9},
    "unknown-features": {"features": 1 << 63 | 1 << 17},
    "bad-l1-table-offset": {"l1_table_offset": 1 << 50},
    "bad-image-size": {"image_size": 513},
    "bad-backing-filename-size": {
        "features": 1,
        "backing_filename_size": 5000,
        "backing_filename_offset": 64,
    },
    "bad-backing-filename-offset": {
        "features": 1,
        "backing_filename_size": 20,
        "backing_filename_offset": 4090,
    },
}


@pytest.mark.parametrize("word", BROKEN)
def test_a_bad_field_is_named(
    word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A field that is wrong is reported as a problem, and all others are described."""
    path = tmp_path / "broken.qed"
    fields = {
        "cluster_size": CLUSTER_BYTES, "table_size": 2, "header_size": 1, "features": 0,
        "compat_features": 0, "autoclear_features": 0, "l1_table_offset": CLUSTER_BYTES,
        "image_size": MIB,
    }  # fmt: skip
    head = build_header(_header(**{**fields, **BROKEN[word]}))
    path.write_bytes(head.ljust(3 * CLUSTER_BYTES, b"\0"))
    value, err = info(path, capsys=capsys)
    assert err == ""
    assert problems(value) == [word]
    assert value["format"] == "qed"
    assert value["safety"]["safe-to-mount"] is False
    assert value["virtual-size"] == {**fields, **BROKEN[word]}["image_size"]
    assert value["problems"][0]["message"] in human(path, capsys=capsys)
    assert info("--backing-chain", path, capsys=capsys)[0] == [value]


def test_all_problems_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a header with many bad fields each is reported, not only the first."""
    path = tmp_path / "broken.qed"
    fields = {
        "cluster_size": CLUSTER_BYTES, "table_size": 2, "header_size": 77, "features": 1 << 20 | 1,
        "compat_features": 4, "autoclear_features": 8, "l1_table_offset": 5, "image_size": 7,
        "backing_filename_offset": 1, "backing_filename_size": 9999,
    }  # fmt: skip
    path.write_bytes(build_header(_header(**fields)))
    found = problems(info(path, capsys=capsys)[0])
    assert found[:4] == [
        "unknown-features",
        "bad-image-size",
        "bad-l1-table-offset",
        "bad-backing-filename-size",
    ]
    assert {"unknown-compat-bits", "unknown-autoclear-bits", "odd-tail"} <= set(found)


def _header(**fields: int) -> Any:  # noqa: ANN401  what `build_header` takes for one
    """Give the fields of a header that no `Header` would accept."""
    return SimpleNamespace(**{"backing_filename_offset": 0, "backing_filename_size": 0, **fields})


@pytest.mark.parametrize("length", [4, 5, 8, 40, 63])
def test_a_truncated_header(
    length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a truncated header the fields that exist are described."""
    path = tmp_path / "short.qed"
    path.write_bytes(build_image(MIB)[:length])
    value, _err = info(path, capsys=capsys)
    assert problems(value) == ["truncated-header"]
    assert value["virtual-size"] == (MIB if length >= 56 else None)
    assert value["cluster-size"] == (CLUSTER_BYTES if length >= 8 else None)
    assert "truncated header" in human(path, capsys=capsys)


def test_random_headers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Any bytes after the magic are described, with one line for each problem."""
    chance = random.Random(11)
    path = tmp_path / "random.qed"
    good = build_image(MIB, {0: b"x"}, backing=b"base")
    for _ in range(300):
        image = bytearray(good if chance.randrange(2) else b"QED\0" + chance.randbytes(9000))
        for _ in range(chance.randrange(1, 5)):
            at = chance.randrange(4, 80)
            image[at] = chance.choice([0, 1, 2, 255, chance.randrange(256)])
        path.write_bytes(image[: chance.choice([len(image), chance.randrange(4, len(image))])])
        value, err = info(path, capsys=capsys)
        assert (value["format"], err) == ("qed", "")
        assert all("\n" not in item["message"] for item in value["problems"])
        human("--allocation", path, capsys=capsys)


def failing(call: Callable[..., Any], argument: int, struck: list[int]) -> Callable[..., Any]:
    """Return a system call that fails with EIO if its last argument has a value."""

    def wrapped(*arguments: Any) -> Any:  # noqa: ANN401  those of the call
        if arguments[-1] == argument:
            struck.append(argument)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*arguments)

    return wrapped


@pytest.mark.parametrize(
    ("call", "argument"), [("pread", 2 * CLUSTER_BYTES), ("lseek", os.SEEK_DATA)]
)
def test_tables_that_the_host_cannot_read_are_a_problem(
    call: str,
    argument: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An image is described, and not called safe, although the host cannot read its L1 table."""
    path = tmp_path / "unreadable.qed"
    image = build_image(MIB, dict.fromkeys(range(6), b"x"), header_size=2)
    put_entry(image, l2_entry_offset(image, 2), 0)
    path.write_bytes(image)
    trio.run(enable, str(path))
    struck: list[int] = []
    monkeypatch.setattr(os, call, failing(getattr(os, call), argument, struck))
    value, err = info(path, capsys=capsys)
    assert err == ""
    assert struck
    assert value["virtual-size"] == MIB
    assert problems(value) == ["l1-unreadable"]
    assert value["safety"]["safe-to-mount"] is False
    listed = value["format-specific"]["data"]["free-list"]
    # The list is read by preadv, and only after a search for the data of the L1 table.
    assert (listed["present"], listed["valid"]) == (True, call == "pread")
    assert f"{path}: L1 table: cannot be read: Input/output error" in human(path, capsys=capsys)


def test_a_backing_name_that_the_host_cannot_read_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image is described, and not called safe, although the host cannot read the base's name."""
    path = tmp_path / "unreadable.qed"
    path.write_bytes(build_image(MIB, backing=b"base.qed"))
    struck: list[int] = []
    monkeypatch.setattr(os, "pread", failing(os.pread, 64, struck))
    value, err = info(path, capsys=capsys)
    assert (err, struck) == ("", [64])
    assert problems(value) == ["backing-name-unreadable"]
    assert (value["safety"]["has-backing"], value["safety"]["safe-to-mount"]) == (True, False)


def test_names_cannot_forge_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters of names in an image are printed escaped."""
    path = tmp_path / "top.qed"
    path.write_bytes(build_image(MIB, backing=b"x\nfile format: raw\x1b[2J\xff"))
    text = human(path, capsys=capsys)
    assert "x\\nfile format: raw\\x1b[2J\\xff" in text
    assert text.splitlines().count("file format: raw") == 0
    assert "\x1b" not in text
    assert info(path, capsys=capsys)[0]["backing-filename"].endswith("\udcff")


def test_info_takes_little_memory_and_few_modules(tmp_path: Path) -> None:
    """An L1 table of 1 GiB is not read, and neither numpy nor trio is loaded."""
    header = Header(1 << 26, 16, 1, 0, 0, 0, 1 << 26, 1 << 60)
    path = tmp_path / "hostile.qed"
    with path.open("wb") as file:
        file.write(build_header(header))
        file.seek(header.l1_table_offset + (1 << 29))
        file.write((1 << 40).to_bytes(8, "little") * (MAX_L1_BYTES // 8 + 10))
        file.truncate(header.l1_end)
    out, peak, modules = memory.run("info", "--output=json", path)
    assert json.loads(out)["format-specific"]["data"]["l2-tables"] is None
    assert not {"numpy", "trio"} & modules
    assert peak < 64 * MIB
