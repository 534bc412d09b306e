"""The README's recipes, its repair and its toolbox work as written."""

from __future__ import annotations

import random
import re
import shutil
import sys
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.ondisk.constants import Feature
from tests.support import qemu
from tests.support.disks import l2_entry_offset, put_entry
from tests.support.sandbox import ROOT, run_in_sandbox

if TYPE_CHECKING:
    from pathlib import Path

BUCKET: Final = "A golden image in a bucket"
"""A recipe that needs a store; tests/remote/test_bucket_example.py tries it."""
RESCUE: Final = "Get files out of a damaged image"
REPAIR: Final = "When an image is damaged"
TOOLBOX: Final = "The toolbox"

SHOWN: Final = {
    "Use the file systems in an image": "hello.txt",
    "Look at a disk without touching it": "Filesystem UUID",
    "Copy files out of a partition": "hello.txt",
    "Mount from /etc/fstab": "fuse.qedfuse",
    "Give freed space back": "trimmed",
    "Restore a backup": "restored",
    "Try something out in an overlay": "changed",
    RESCUE: "hello.txt",
    "From Python": "",
    REPAIR: "damaged.qed: sound",
    TOOLBOX: "try.qed: sound",
}
"""For each recipe, a text that its output contains if it succeeded."""

AFTERWARDS: Final = {
    "Restore a backup": """
        cmp backup.raw "$3"
        mkdir -p again
        qedfuse -r vm.qed again
        cmp again/vm.raw "$3"
        qedfuse umount again
        echo restored
    """,
    RESCUE: """
        grep -q 'Hello from the guest' recovered/hello.txt
        cmp rescued.raw "$3"
    """,
    "From Python": "grep -q changed vm.qed",
    TOOLBOX: 'cmp try.raw "$3"',
}
"""For some recipes, shell commands that must succeed afterwards."""

CHANGED: Final = (
    "Use the file systems in an image",
    "Mount from /etc/fstab",
    "Give freed space back",
    "Restore a backup",
    "From Python",
    REPAIR,
)
"""Recipes that change an image; the others must not."""


def recipes() -> dict[str, list[tuple[str, str]]]:
    """Read the README: for each recipe its blocks, as language and text."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    chapters = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    found = dict(part.split("\n", 1) for part in chapters["Recipes"].split("\n### ")[1:])
    found |= {name: chapters[name] for name in (REPAIR, TOOLBOX)}
    blocks = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return {name: blocks.findall(body) for name, body in found.items()}


def as_script(blocks: list[tuple[str, str]]) -> str:
    """Turn the blocks of a recipe into one script."""
    ways = {
        "sh": "{}",
        "fstab": "cat >>/etc/fstab <<'END'\n{}END\n",
        "python": f"{sys.executable} - <<'END'\n{{}}END\n",
    }
    return "\n".join(ways[language].format(text) for language, text in blocks)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a raw disk with one partition at sector 2048, and ext4 with one file on it."""
    directory = tmp_path_factory.mktemp("raw")
    tree = directory / "tree"
    tree.mkdir()
    (tree / "hello.txt").write_text("Hello from the guest\n", encoding="utf-8")
    disk = directory / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    run_in_sandbox(
        """
        echo 'label: dos
        start=2048, type=83' | sfdisk --quiet "$1"
        mkfs.ext4 -q -d "$2" -E offset=1048576 "$1" 32M
        """,
        disk,
        tree,
    )
    return disk


@pytest.fixture(scope="module")
def images(raw: Path) -> Path:
    """Give a directory with the images that the recipes use: ``vm.qed`` and ``damaged.qed``."""
    directory = raw.with_name("images")
    directory.mkdir()
    qemu.convert(raw, directory / "vm.qed", source_format="raw", target_format="qed")
    content = bytearray((directory / "vm.qed").read_bytes())
    content[16] |= Feature.NEED_CHECK
    # The last entry of the L1 table, which no guest offset uses, points into the table.
    content[5 * 65536 - 8 : 5 * 65536] = (65536).to_bytes(8, "little")
    (directory / "damaged.qed").write_bytes(content)
    return directory


def test_every_recipe_is_tried() -> None:
    """Each recipe of the README has an expected output here, or a test of its own."""
    assert recipes().keys() == SHOWN.keys() | {BUCKET}


@pytest.mark.parametrize("name", SHOWN)
def test_recipe(name: str, images: Path, raw: Path, installation: Path) -> None:
    """A recipe does what it promises on a machine where the project is installed."""
    shown = run_in_sandbox(
        f"""
        {ROOT}/examples/install.sh --link "$1" 2>/dev/null
        export PYTHONPATH={ROOT}
        cp --sparse=always "$2"/*.qed /srv/images
        cd /srv/images
        {as_script(recipes()[name])}
        {AFTERWARDS.get(name, "")}
        ! findmnt --types fuse.qedfuse
        echo "changed images: $(for image in *.qed; do cmp "$2/$image" "$image" || :; done 2>&1)"
        """,
        installation,
        images,
        raw,
    )
    assert SHOWN[name] in shown
    if name not in CHANGED:
        assert "differ" not in shown


def test_a_rescue_loses_only_what_cannot_be_read(
    raw: Path, tmp_path: Path, installation: Path
) -> None:
    """With the smallest clusters, the rescued copy has zeros only for the bad cluster."""
    whole, image = tmp_path / "whole.raw", tmp_path / "damaged.qed"
    shutil.copyfile(raw, whole)
    start = 40 << 20  # behind the partition
    with whole.open("r+b") as file:
        file.seek(start)
        file.write(random.Random(1).randbytes(1 << 18))
    options = ("-o", "cluster_size=4096")
    qemu.convert(whole, image, *options, source_format="raw", target_format="qed")
    content = bytearray(image.read_bytes())
    bad = start + (100 << 10)
    put_entry(content, l2_entry_offset(content, bad // 4096), 1 << 40)
    image.write_bytes(content)
    run_in_sandbox(
        f"""
        {ROOT}/examples/install.sh --link "$1" 2>/dev/null
        export PYTHONPATH={ROOT}
        cp "$2"/damaged.qed /srv/images
        {as_script(recipes()[RESCUE])}
        cp rescued.raw "$2"
        qedimg check -r all --dry-run damaged.qed >"$2/lost" || test $? = 2
        """,
        installation,
        tmp_path,
    )
    expected = bytearray(whole.read_bytes())
    expected[bad : bad + 4096] = bytes(4096)
    assert (tmp_path / "rescued.raw").read_bytes() == expected
    lost = [line for line in (tmp_path / "lost").read_text().splitlines() if "lost" in line]
    assert lost == [f"would be lost: 4096 bytes of the disk at {bad} (l2-out-of-file)"]
