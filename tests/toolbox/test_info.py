"""``qedimg info`` compared with ``qemu-img info``, and what it reports besides."""

from __future__ import annotations

import errno
import json
import os
import random
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.ondisk.constants import ZERO, Feature
from qedfuse.tools.inspection import chaininfo
from qedfuse.tools.inspection import info as tool
from qedfuse.tools.inspection.nameresolution import resolve_name
from tests.support import qemu
from tests.support.chains import draw_any_size, draw_chain
from tests.support.disks import build_image, l2_entry_offset, put_entry
from tests.support.share import share

if TYPE_CHECKING:
    from collections.abc import Callable

CLUSTER_BYTES = 4096
MIB = 1 << 20


def info(
    *arguments: str | Path, capsys: pytest.CaptureFixture[str], code: int = 0
) -> tuple[Any, str]:
    """Run the command with JSON; give its output and its error message."""
    assert main(["info", "--output", "json", *map(str, arguments)]) == code
    said = capsys.readouterr()
    return json.loads(said.out or "null"), said.err


def human(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command with text output; give the output."""
    assert main(["info", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def problems(value: dict[str, Any]) -> list[str]:
    """Return the codes of the problems."""
    return [item["code"] for item in value["problems"]]


def assert_common_fields(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Assert that both programs report the same in their common fields."""
    assert {key: ours.get(key) for key in theirs} == theirs
    own = {"format-specific", "safety", "problems"} if theirs["format"] == "qed" else set()
    if "children" not in theirs:  # before version 8.0
        own.add("children")
    assert ours.keys() - theirs.keys() == own


@pytest.mark.parametrize("form", ["qed", "raw"])
def test_scripts_for_a_newer_qemu_find_the_file(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ``children`` of QEMU 8.0 and later are reported, whatever QEMU is installed."""
    path = tmp_path / f"a.{form}"
    if form == "qed":
        qemu.create(path, MIB)
    with path.open("ab") as file:
        file.write(b"x" * 1000)
    (child,) = info(path, capsys=capsys)[0]["children"]
    assert child["name"] == "file"
    inner, status = child["info"], path.stat()
    assert (inner["filename"], inner["format"]) == (str(path), "file")
    assert inner["virtual-size"] == -(-status.st_size // 512) * 512
    assert inner["actual-size"] == status.st_blocks * 512
    theirs = qemu.info(path).get("children")
    assert theirs in (None, [child])


@pytest.mark.parametrize("seed", range(share(8, of=24)))
def test_fields_agree_with_qemu(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All common fields are QEMU's, for each image and for the whole chain."""
    chance = random.Random(seed)
    top = draw_chain(tmp_path, chance, "image", chance.randrange(1, 5), draw_any_size)
    for path in tmp_path.iterdir():
        assert_common_fields(info(path, capsys=capsys)[0], qemu.info(path))
        lines = human(path, capsys=capsys).splitlines()
        theirs = qemu.run("qemu-img", "info", path).stdout.splitlines()
        words = ("image:", "file format:", "cluster_size:", "backing file")
        assert [line for line in lines if line.startswith(words)] == [
            line for line in theirs if line.startswith(words)
        ]
    ours, _err = info("--backing-chain", top, capsys=capsys)
    found = qemu.run("qemu-img", "info", "--backing-chain", "--output=json", top).stdout
    for one, other in zip(ours, json.loads(found), strict=True):
        assert_common_fields(one, other)


def test_names_of_the_base_are_those_of_qemu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names of a base are those that QEMU reports, and the resolved name is added."""
    (tmp_path / "sub").mkdir()
    base = qemu.create(tmp_path / "base.qed", MIB)
    path = qemu.create(tmp_path / "sub" / "top.qed", backing="../base.qed")
    value, _err = info(path, capsys=capsys)
    assert_common_fields(value, qemu.info(path))
    assert value["full-backing-filename"] == f"{tmp_path}/sub/../base.qed"
    assert value["format-specific"]["data"]["resolved-backing-filename"] == str(base)
    assert value["safety"]["escapes-directory"] is True
    assert value["safety"]["safe-to-mount"] is False


def test_no_base_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --backing-chain the base need not exist and is not opened."""
    path = tmp_path / "top.qed"
    path.write_bytes(build_image(MIB, backing=b"/no/such/file"))
    value, err = info(path, capsys=capsys)
    assert (value["backing-filename"], err) == ("/no/such/file", "")
    assert (value["safety"]["absolute"], value["safety"]["escapes-directory"]) == (True, True)
    assert "No such file" in info("--backing-chain", path, capsys=capsys, code=17)[1]


def test_which_bases_may_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The chain is followed inside the directory, or where the user allows it."""
    (tmp_path / "sub").mkdir()
    qemu.create(tmp_path / "base.qed", MIB)
    path = qemu.create(tmp_path / "sub" / "top.qed", backing="../base.qed")
    assert "refused" in info("--backing-chain", path, capsys=capsys, code=17)[1]
    for words in (("--backing", "any"), ("--backing-dir", str(tmp_path))):
        chain, _err = info("--backing-chain", *words, path, capsys=capsys)
        assert [item["virtual-size"] for item in chain] == [MIB, MIB]
    refused = ("--backing", "none", "--backing-chain")
    assert "backing=none" in info(*refused, path, capsys=capsys, code=17)[1]


def test_a_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chain with a loop is refused, and so is one of more than 64 backing files."""
    for number in range(70):
        name = f"{number + 1}.qed".encode()
        (tmp_path / f"{number}.qed").write_bytes(build_image(MIB, backing=name))
    (tmp_path / "a.qed").write_bytes(build_image(MIB, backing=b"b.qed"))
    (tmp_path / "b.qed").write_bytes(build_image(MIB, backing=b"a.qed"))
    assert "loop" in info("--backing-chain", tmp_path / "a.qed", capsys=capsys, code=17)[1]
    assert (
        "64 backing files" in info("--backing-chain", tmp_path / "0.qed", capsys=capsys, code=17)[1]
    )


def record(call: Callable[..., Any], paths: list[str], path: str, *more: Any, **named: Any) -> Any:  # noqa: ANN401  those of the call
    """Make a system call, and record its path."""
    paths.append(path)
    return call(path, *more, **named)


def test_a_base_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that the host cannot read is one line with the name of the base."""
    base, path = tmp_path / "base.qed", tmp_path / "top.qed"
    base.write_bytes(build_image(MIB))
    path.write_bytes(build_image(MIB, backing=b"base.qed"))

    def failing(_fd: int, _path: str, _form: str, _allowed: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(chaininfo, "describe_open", failing)
    _value, err = info("--backing-chain", path, capsys=capsys, code=1)
    assert err == f"qedimg: {base}: read: Input/output error\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"base.qed", ("dir/base.qed", False)),
        (b"sub/./base.qed", ("dir/sub/base.qed", False)),
        (b"../dir/base.qed", ("dir/base.qed", False)),
        (b"../base.qed", ("base.qed", True)),
        (b"sub/../../base.qed", ("base.qed", True)),
        (b"link/base.qed", ("base.qed", True)),
        (b"sub/../base.qed", ("dir/base.qed", False)),
        (b"link/../dir/base.qed", ("../dir/base.qed", True)),
        (b"sub/../../dir/base.qed", ("dir/base.qed", False)),
        (b"out/base.qed", ("outside/base.qed", True)),
        (b"out/../dir/base.qed", ("dir/base.qed", True)),
        (b"around/base.qed", ("dir/sub/base.qed", False)),
        (b"sub/around/base.qed", ("dir/sub/base.qed", False)),
        (b"self/base.qed", ("dir/self/base.qed", True)),
        (b"link40", ("dir/sub", False)),
        (b"link41", ("dir/link1", True)),
        (b"file", ("outside/file", True)),
        (b"..", ("", True)),
        (b"", ("dir", True)),
    ],
)
def test_resolution_of_a_backing_name(
    name: bytes, expected: tuple[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dots and up to 40 links are resolved; a name that leaves the directory is not looked up."""
    directory, outside = tmp_path / "dir", tmp_path / "outside"
    (directory / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "file").touch()
    (directory / "link").symlink_to("..")
    (directory / "out").symlink_to(outside)
    (directory / "file").symlink_to("../outside/file")
    (directory / "around").symlink_to("../dir/sub")
    (directory / "sub" / "around").symlink_to(directory / "sub" / "." / ".." / "around")
    (directory / "self").symlink_to("self")
    (directory / "link1").symlink_to("sub")
    for number in range(2, 42):
        (directory / f"link{number}").symlink_to(f"link{number - 1}")
    looked_up: list[str] = []
    for call in ("lstat", "stat", "readlink"):
        monkeypatch.setattr(os, call, partial(record, getattr(os, call), looked_up))
    resolved = resolve_name(name, str(directory / "top.qed"), raw_format=False)
    monkeypatch.undo()
    assert not [path for path in looked_up if Path(path).is_relative_to(outside)]
    where = os.path.normpath(tmp_path / expected[0])
    assert (resolved.resolved, resolved.escapes) == (where, expected[1])


def test_schemes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that QEMU would take for a protocol is reported and not treated as a file."""
    names = {b"json:{}": "json", b"ssh://host/x": "ssh", b":x": "", b"a/b:c": None, b"./b:c": None}
    for name, scheme in names.items():
        path = tmp_path / "top.qed"
        path.write_bytes(build_image(MIB, backing=name))
        value, _err = info(path, capsys=capsys)
        safety = value["safety"]
        assert safety["scheme"] == scheme
        assert safety["safe-to-mount"] == (scheme is None)
        assert ("backing-scheme" in problems(value)) == (scheme is not None)


def test_need_check_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NEED_CHECK is reported, which QEMU does not do."""
    path = tmp_path / "dirty.qed"
    path.write_bytes(build_image(MIB, features=Feature.NEED_CHECK, table_size=2))
    value, _err = info(path, capsys=capsys)
    assert value["dirty-flag"] is True
    assert value["safety"]["need-check"] is True
    assert problems(value) == ["need-check-set"]
    assert "need check: yes" in human(path, capsys=capsys)
    assert qemu.info(path)["dirty-flag"] is False


def test_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Feature bits are reported by name and by number."""
    path = tmp_path / "features.qed"
    path.write_bytes(
        build_image(MIB, features=1 << 9, compat=1 << 40, autoclear=3, backing=b"base")
    )
    value, _err = info(path, capsys=capsys)
    features = value["format-specific"]["data"]["features"]
    assert features == {
        "incompatible": {"value": 513, "names": ["backing_file"], "unknown-bits": [9]},
        "compatible": {"value": 1 << 40, "names": [], "unknown-bits": [40]},
        "autoclear": {"value": 3, "names": [], "unknown-bits": [0, 1]},
    }
    assert value["safety"]["flags"] == ["backing_file", 9]
    assert "0x201 (backing_file, unknown bit 9)" in human(path, capsys=capsys)


def test_allocation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Clusters are counted with --allocation, L2 tables always, and bad ones separately."""
    path = tmp_path / "disk.qed"
    image = build_image(8 * MIB, {0: b"x", 3: ZERO, 4: ZERO, 700: b"y", 1500: b"z"})
    path.write_bytes(image)
    value, _err = info(path, capsys=capsys)
    data = value["format-specific"]["data"]
    assert (data["l2-tables"], data["l2-tables-possible"]) == (3, 4)
    assert "allocation" not in data
    value, _err = info("--allocation", path, capsys=capsys)
    assert value["format-specific"]["data"]["allocation"] == {
        "l2-tables": 3, "bad-tables": 0, "data-clusters": 3, "zero-clusters": 2,
    }  # fmt: skip
    image[CLUSTER_BYTES + 8 * 3 : CLUSTER_BYTES + 8 * 4] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(image)
    value, _err = info("--allocation", path, capsys=capsys)
    assert value["format-specific"]["data"]["allocation"]["bad-tables"] == 1
    assert problems(value) == ["l1-wild"]


def test_a_free_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A free list is reported as valid or not, although QEMU refuses the image."""
    content = build_image(MIB, dict.fromkeys(range(6), b"x"), table_size=2)
    for number in (1, 2, 4):
        put_entry(content, l2_entry_offset(content, number), 0)
    path = tmp_path / "disk.qed"
    path.write_bytes(content)
    assert main(["freelist", "on", str(path), "-q"]) == 0
    value, _err = info(path, capsys=capsys)
    found = value["format-specific"]["data"]["free-list"]
    assert (found["present"], found["valid"], found["free-clusters"]) == (True, True, 3)
    assert problems(value) == []
    assert "free list: 3 clusters" in human(path, capsys=capsys)
    with path.open("r+b") as file:
        file.seek(3600)
        file.write(b"\xff")
    found = info(path, capsys=capsys)[0]["format-specific"]["data"]["free-list"]
    assert found["valid"] is False
    assert "checksum" in found["problem"]


def test_files_that_are_no_qed_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file without a magic is raw, a foreign format is named, and a directory is refused."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"x" * 1000)
    assert_common_fields(info(raw, capsys=capsys)[0], qemu.info(raw))
    assert "magic" in info("-f", "qed", raw, capsys=capsys, code=12)[1]
    foreign = qemu.create(tmp_path / "foreign.img", MIB, image_format="qcow2")
    value, _err = info(foreign, capsys=capsys)
    assert (value["format"], value["virtual-size"]) == ("qcow2", MIB)
    assert info("-f", "raw", foreign, capsys=capsys)[0]["format"] == "raw"
    assert "directory" in info(tmp_path, capsys=capsys, code=12)[1]
    assert "No such file" in info(tmp_path / "none", capsys=capsys, code=1)[1]


def test_beside_a_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image in use is described only with -U."""
    path = qemu.create(tmp_path / "disk.qed", MIB)
    with qemu.hold(path):
        assert "in use" in info(path, capsys=capsys, code=16)[1]
        assert info("-U", path, capsys=capsys)[0]["virtual-size"] == MIB


def test_from_python(tmp_path: Path) -> None:
    """The function returns the same as data."""
    path = tmp_path / "disk.qed"
    path.write_bytes(build_image(MIB, {0: b"x"}))
    found = tool.describe(str(path))
    assert (found.format, found.virtual_size, found.file_size) == ("qed", MIB, 4 * CLUSTER_BYTES)
    assert found.qed is not None
    assert found.qed.l2_tables == 1
    assert found.qed.mountable
