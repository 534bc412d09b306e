"""Backing names written ``file:NAME``, compared with qemu-img."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.cli.qedimg.main import main
from qedfuse.disk.lookup.backingpath import backing_path, has_protocol
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import BackingError
from qedfuse.tools.copying.convert import convert
from qedfuse.tools.copying.imagespec import ImageSpec
from qedfuse.tools.copying.measure import measure
from qedfuse.tools.editing.commit import commit
from qedfuse.tools.editing.rebase import rebase
from tests.support import qemu
from tests.support.mounted import mounted, qedfuse, refused

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES = 1 << 20


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a directory with bases, and a subdirectory with other bases of the same names."""
    (tmp_path / "sub").mkdir()
    for directory, number in ((tmp_path, 1), (tmp_path / "sub", 2)):
        for name in ("base.qed", "co:lon.qed"):
            qemu.create(f"{directory}/{name}", DISK_BYTES)
            qemu.io(f"{directory}/{name}", f"write -P {number} 0 64k")
        (directory / "base.raw").write_bytes(bytes([number]) * DISK_BYTES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("image", "name", "base_format"),
    [
        ("top.qed", "file:./base.qed", "qed"),
        ("sub/top.qed", "file:base.raw", "raw"),
        ("sub/top.qed", "file:co:lon.qed", "qed"),
        ("top.qed", "file://{cwd}/sub/base.raw", "raw"),
    ],
)
def test_such_names_mean_the_same_as_for_qemu(
    cwd: Path, image: str, name: str, base_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name after file: begins at the working directory, wherever the image is."""
    name = name.format(cwd=cwd)
    options = ["-b", name, "-F", base_format]
    theirs = image.replace("top", "theirs")
    qemu.run("qemu-img", "create", "-q", "-f", "qed", *options, theirs)
    assert main(["create", "-q", *options, image]) == 0
    anywhere = ["--backing", "any"]
    for path in (image, theirs):
        qemu.run("qemu-io", "-f", "qed", "-c", "write -P 7 64k 64k", path)
        capsys.readouterr()
        assert main(["map", "--output", "json", *anywhere, path]) == 0
        ours = json.loads(capsys.readouterr().out)
        keys = ("start", "length", "depth", "zero", "data")
        done = qemu.run("qemu-img", "map", "-f", "qed", "--output", "json", path)
        expected = [tuple(part[key] for key in keys) for part in json.loads(done.stdout)]
        assert [tuple(part[key] for key in keys) for part in ours] == expected
        assert main(["info", "--output", "json", path]) == 0
        ours = json.loads(capsys.readouterr().out)
        said = json.loads(qemu.run("qemu-img", "info", "--output", "json", path).stdout)
        for key in ("backing-filename", "full-backing-filename"):
            assert ours[key] == said[key] == name
        assert ours["safety"]["scheme"] is None
        assert main(["convert", "-q", "-O", "raw", *anywhere, path, "flat.raw", "--force"]) == 0
        assert (cwd / "flat.raw").read_bytes() == qemu.content(path)


def test_such_a_name_can_be_given_to_every_command(cwd: Path) -> None:
    """Each command accepts such a name and stores it unchanged."""
    assert main(["create", "-q", "-b", "base.qed", "top.qed"]) == 0
    for words in (
        ["rebase", "-q", "-b", "file:base.qed", "top.qed"],
        ["rebase", "-q", "-u", "-F", "qed", "-b", "file:base.qed", "top.qed"],
        ["convert", "-q", "-O", "qed", "-B", "file:base.qed", "base.raw", "copy.qed"],
    ):
        assert main(words) == 0
        assert qemu.info(words[-1])["backing-filename"] == "file:base.qed"
    assert qemu.content("copy.qed") == (cwd / "base.raw").read_bytes()
    before = qemu.content("copy.qed")
    assert main(["commit", "-q", "copy.qed"]) == 0
    assert qemu.content("base.qed") == before
    assert main(["create", "-q", "-b", "file:top.qed", "-F", "qed", "top.qed", "--force"]) == 17


@pytest.mark.parametrize("name", ["file:/etc/passwd", "file:../outside.raw", "file:sub/../../out"])
def test_such_names_are_confined_like_any_other(
    cwd: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path after the prefix that leaves the directory is refused."""
    for out in ("outside.raw", "out"):
        (cwd.parent / out).write_bytes(b"secret" * 1000)
    qemu.create("top.qed", DISK_BYTES)
    words = ["-u", "-F", "raw", "-b", name, "top.qed"]
    qemu.run("qemu-img", "rebase", "-f", "qed", *words)
    (cwd / "mnt").mkdir()
    assert "refused: found" in refused(f"{cwd}/top.qed", cwd / "mnt", code=17)
    assert main(["map", "-q", "top.qed"]) == 17
    capsys.readouterr()
    assert main(["info", "--output", "json", "top.qed"]) == 0
    assert json.loads(capsys.readouterr().out)["safety"]["escapes-directory"]


def test_a_mount_resolves_such_names_at_its_start(cwd: Path) -> None:
    """A mount resolves such names at the working directory in which it was started."""
    qemu.run("qemu-img", "create", "-q", "-f", "qed", "-b", "file:base.raw", "-F", "raw", "top.qed")
    with mounted("top.qed", cwd / "mnt") as directory:
        assert (directory / "top.raw").read_bytes() == b"\1" * DISK_BYTES
    with mounted("top.qed", cwd / "mnt", "-o", "overlay=over.qed") as directory:
        (directory / "top.raw").open("r+b").close()
    done = qedfuse(cwd / "top.qed", cwd / "mnt", cwd="/")
    assert done.returncode == 17
    assert "top.qed: backing file /base.raw: cannot open" in done.stderr


@pytest.mark.parametrize("command", ["commit", "commit lower", "rebase", "convert", "measure"])
def test_programs_choose_where_such_names_begin(
    command: str, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program can set the working directory for such names, which then is used everywhere."""
    policy = BackingPolicy(mode="any", working_directory=str(cwd))
    options = OpenOptions(writable=True, backing=policy)
    base, other = cwd / "base.raw", cwd / "sub" / "base.raw"
    top = str(cwd / "top.qed")
    qemu.run("qemu-img", "create", "-q", "-f", "qed", "-b", "file:base.raw", "-F", "raw", top)
    qemu.io(top, "write -P 7 0 64k")
    before = other.read_bytes()
    monkeypatch.chdir(cwd / "sub")
    base_layout = ImageSpec(backing="file:base.raw", backing_format="raw")
    new = str(cwd / "new.qed")
    if command == "commit":
        assert trio.run(partial(commit, top, options=options)).base == str(base)
    elif command == "commit lower":
        result = trio.run(partial(commit, top, base="file:base.raw", options=options))
        assert result.base == str(base)
    elif command == "rebase":
        qemu.create(cwd / "other.qed", DISK_BYTES)
        rebased = partial(rebase, top, "file:other.qed", backing_format="qed", options=options)
        assert trio.run(rebased).copied_bytes == DISK_BYTES - (64 << 10)
    elif command == "convert":
        work = partial(convert, top, new, base_layout, compare=True, options=options)
        assert trio.run(work).data_bytes == 64 << 10
    else:
        needs = trio.run(partial(measure, top, base_layout, image=new, options=options))
        assert needs.required < DISK_BYTES
    assert other.read_bytes() == before
    if command.startswith("commit"):
        assert base.read_bytes() == b"\7" * (64 << 10) + b"\1" * (DISK_BYTES - (64 << 10))


@pytest.mark.parametrize("unsafe", [False, True])
def test_a_loop_is_found_by_such_names(
    *, unsafe: bool, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that is the image itself is refused, also with another file of that name nearby."""
    policy = BackingPolicy(mode="any", working_directory=str(cwd))
    monkeypatch.chdir(cwd / "sub")
    options = OpenOptions(backing=policy)
    work = partial(rebase, str(cwd / "base.qed"), "file:base.qed", backing_format="qed")
    with pytest.raises(BackingError):
        trio.run(partial(work, unsafe=unsafe, options=options))


def test_protocol_and_path_of_a_name() -> None:
    """``file:`` at the start of a name is stripped; other prefixes before a colon are protocols."""
    assert not has_protocol(b"file:x:y")
    assert not has_protocol(b"./nbd:x")
    assert has_protocol(b"files:x")
    assert has_protocol(b"nbd:x")
    assert backing_path("d/top.qed", "base") == "d/base"
    assert backing_path("d/top.qed", "/base") == "/base"
    assert backing_path("d/top.qed", "file:base") == "base"
    assert backing_path("d/top.qed", "file:base", "/w") == os.path.join("/w", "base")  # noqa: PTH118
    assert backing_path("d/top.qed", "file:file:x") == "file:x"
