"""The descriptions of chains that mix formats have the facts that QEMU reports."""

from __future__ import annotations

import json
import random
import subprocess
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from qedfuse.errors import ForeignError
from qedfuse.foreign import virtualsize
from qedfuse.tools.inspection.chaininfo import describe_chain
from tests.support import qemu
from tests.support.foreignchains import draw_chain, processes, write_out
from tests.support.programs import qedimg
from tests.support.share import share

if TYPE_CHECKING:
    from pathlib import Path

MIB: Final = 1 << 20

COMMON: Final = (
    *("filename", "format", "virtual-size", "actual-size"),
    *("backing-filename", "full-backing-filename", "backing-filename-format"),
)
"""The keys of both programs that say what a chain is."""

CHAINS: Final = [
    ("qed", "qcow2", "vmdk", "vmdk"),
    ("qed", "qcow2", "vmdk"),
    ("qed", "qcow2", "qed", "raw"),
    ("qed", "qcow2", "qed", "vdi"),
    ("qed", "qcow", "qcow2", "qed", "qcow", "vhdx"),
    ("qed", "qed", "qcow2", "raw"),
    ("qed", "vpc"),
    ("qcow2", "qed", "parallels"),
    ("vmdk", "vmdk", "vmdk"),
    ("qcow", "raw"),
    ("vdi",),
]
"""Chains by the formats of their images, from the top one down."""


def make_chain(directory: Path, formats: tuple[str, ...]) -> Path:
    """Make images of different sizes, each over the next one; return the path of the first."""
    base, found = None, "raw"
    for number, image_format in enumerate(reversed(formats)):
        path = directory / f"{number}.{image_format}"
        # A VMDK image always takes the size of its parent.
        is_child = base is not None and image_format == "vmdk"
        size = None if is_child else (8 - number) * MIB + 512 * (image_format != "vhdx")
        qemu.create(
            path, size, image_format=image_format, backing=base and base.name, backing_format=found
        )
        base, found = path, image_format
    assert base is not None
    return base


def run(*words: str | Path) -> str:
    """Run ``qedimg info --backing-chain``, which must succeed without a message."""
    code, output, complaint = qedimg("info", "--backing-chain", "--foreign", "qemu", *words)
    assert (code, complaint) == (0, "")
    return output


def common(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what both programs must report of each image."""
    return [{key: item[key] for key in COMMON if key in item} for item in found]


def assert_as_qemu(path: Path) -> list[dict[str, Any]]:
    """Assert that text and JSON name the images that QEMU names; return what is common."""
    write_out(path.parent)
    ours = common(json.loads(run("--output", "json", path)))
    command = ("qemu-img", "info", "--backing-chain")
    assert ours == common(json.loads(qemu.run(*command, "--output=json", path).stdout))
    starts = ("image:", "file format:", "virtual size:", "backing file", "disk size:")
    lines = [
        [line for line in text.splitlines() if line.startswith(starts)]
        for text in (run(path), qemu.run(*command, path).stdout)
    ]
    # The programs round sizes in different ways.
    exact = [[line.partition("(")[2] or line.split(":")[0] for line in text] for text in lines]
    assert exact[0] == exact[1]
    names = [[line for line in text if " size:" not in line] for text in lines]
    assert names[0] == names[1]
    assert processes(path.parent) == []
    return ours


@pytest.mark.parametrize("formats", CHAINS, ids="-".join)
def test_mixed_chain(tmp_path: Path, formats: tuple[str, ...]) -> None:
    """Each image of a chain is described, also below the first one that QEMU reads."""
    found = assert_as_qemu(make_chain(tmp_path, formats))
    assert [item["format"] for item in found] == list(formats)


@pytest.mark.parametrize("seed", range(share(2, of=40)))
def test_random_chain(tmp_path: Path, seed: int) -> None:
    """So is each image of a random chain, some of which name their bases by absolute paths."""
    assert len(assert_as_qemu(draw_chain(tmp_path, random.Random(seed), "qed")[0])) > 1


def test_only_the_image(tmp_path: Path) -> None:
    """Without the option only the image is described, with the name of its base."""
    path = make_chain(tmp_path, ("qcow2", "qed", "raw"))
    write_out(tmp_path)
    code, output, complaint = qedimg("info", "--output", "json", path)
    assert (code, complaint) == (0, "")
    assert common([json.loads(output)]) == common([qemu.info(path)])


def test_raw_by_another_name(tmp_path: Path) -> None:
    """The format of a base is shown as the image states it, and the base is described as raw."""
    path = make_chain(tmp_path, ("qcow2", "raw"))
    content = path.read_bytes()
    assert content.count(b"\0\0\0\3raw\0") == 1
    path.write_bytes(content.replace(b"\0\0\0\3raw\0", b"\0\0\0\4file"))
    found = json.loads(run("--output", "json", path))
    assert found[0]["backing-filename-format"] == "file"
    assert [item["format"] for item in found] == ["qcow2", "raw"]


def test_image_in_use(tmp_path: Path) -> None:
    """An image below that another program writes to is described only with ``-U``."""
    path = make_chain(tmp_path, ("qed", "qcow2", "qcow2"))
    with qemu.hold(tmp_path / "0.qcow2", image_format="qcow2"):
        code, _, complaint = qedimg("info", "--backing-chain", "--foreign", "qemu", path)
        assert (code, "0.qcow2: in use" in complaint) == (16, True)
        found = json.loads(run("-U", "--output", "json", path))
    assert [item["virtual-size"] for item in found] == [
        item["virtual-size"] for item in json.loads(run("--output", "json", path))
    ]


def test_not_allowed(tmp_path: Path) -> None:
    """A chain is described only if the user allows QEMU, and each base where it lies."""
    path = make_chain(tmp_path, ("qed", "qcow2", "vdi"))
    code, output, complaint = qedimg("info", "--backing-chain", path)
    assert (code, output, "foreign=qemu" in complaint) == (17, "", True)
    (tmp_path / "sub").mkdir()
    (tmp_path / "0.vdi").rename(tmp_path / "sub" / "0.vdi")
    words = ("rebase", "-q", "-u", "-f", "qcow2", "-b", tmp_path / "sub" / "0.vdi", "-F", "vdi")
    qemu.run("qemu-img", *words, tmp_path / "1.qcow2")
    (tmp_path / "top").mkdir()
    for name in ("1.qcow2", "2.qed"):
        (tmp_path / name).rename(tmp_path / "top" / name)
    moved = tmp_path / "top" / path.name
    code, output, complaint = qedimg("info", "--backing-chain", "--foreign", "qemu", moved)
    assert (code, output, "refused" in complaint) == (17, "", True)
    found = json.loads(run("--backing-dir", tmp_path / "sub", "--output", "json", moved))
    assert [item["format"] for item in found] == ["qed", "qcow2", "vdi"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 3", "ended with status 3"),
        ("kill -9 $$", "ended by SIGKILL"),
        ("echo x", "found output without a size, expected one"),
        ("echo '[1]'", "found output without a size, expected one"),
        ("echo '{}'", "found output without a size, expected one"),
        (r"printf '\377%04000d' 0", "found output without a size, expected one (Unicode"),
        ('echo \'{"virtual-size": "1"}\'', "found a size that no disk has"),
        ("echo '{\"virtual-size\": true}'", "found a size that no disk has"),
        ("echo '{\"virtual-size\": -1}'", "found a size that no disk has"),
        ("echo '{\"virtual-size\": 9223372036854775808}'", "found a size that no disk has"),
        ("while :; do echo xxxxxxxxxxxxxxxxxx; done", "found more than 4096 bytes of output"),
        ("exec sleep 1000", "found no end for 0 s, expected one"),
        ("echo '{}'; exec >&-; exec sleep 1000", "found no end after its output, expected one"),
    ],
)
async def test_program_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: str
) -> None:
    """If qemu-img fails, the error names the image, and the program is not left behind."""
    path = chain_with_program(tmp_path, monkeypatch, script)
    monkeypatch.setattr(virtualsize, "_MAX_OUTPUT_BYTES", 4096)
    if "for 0 s" in expected:
        monkeypatch.setattr(virtualsize, "_MAX_SECONDS", 0.4)
    if "after its output" in expected:
        monkeypatch.setattr(virtualsize, "_END_SECONDS", 0.4)
    with pytest.raises(ForeignError) as raised:
        await describe_chain(str(path))
    assert str(raised.value).startswith(f"{tmp_path}/0.vdi: qemu-img: {expected}")
    assert len(str(raised.value)) < len(str(tmp_path)) + 200
    assert processes(tmp_path) == []


def chain_with_program(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Make a chain; return its path.  The shell script runs in place of qemu-img for its base."""
    path = make_chain(directory, ("qcow2", "vdi"))
    program = directory / "qemu-img"
    program.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(virtualsize, "find_program", lambda *_names: str(program))
    return path


@pytest.mark.parametrize(
    ("script", "step"),
    [
        ("exec sleep 1000", "spawn_confined"),
        ("echo '{}'; exec >&-; exec sleep 1000", "_read_all"),
    ],
)
async def test_cancelled_while_the_program_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, step: str
) -> None:
    """Ctrl-C ends the wait for qemu-img, before and after its output, and ends the program."""
    path = chain_with_program(tmp_path, monkeypatch, script)
    original = getattr(virtualsize, step)
    scope = trio.CancelScope()

    def cancel_after(*arguments: object, **more: object) -> object:
        found = original(*arguments, **more)
        trio.from_thread.run_sync(scope.cancel)
        return found

    monkeypatch.setattr(virtualsize, step, cancel_after)
    with scope:
        await describe_chain(str(path))
    assert scope.cancelled_caught
    assert processes(tmp_path) == []


async def test_program_that_cannot_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A qemu-img that waits for the host's disk, and so does not end, does not block qedimg."""
    path = chain_with_program(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(virtualsize, "_MAX_SECONDS", 0.4)
    kill = subprocess.Popen.kill
    found: list[subprocess.Popen[bytes]] = []

    def remember(process: subprocess.Popen[bytes]) -> None:
        found.append(process)

    monkeypatch.setattr(subprocess.Popen, "kill", remember)
    with pytest.raises(ForeignError, match="found no end for 0 s"):
        await describe_chain(str(path))
    assert found[0].poll() is None
    kill(found[0])
    found[0].wait()
    assert processes(tmp_path) == []
