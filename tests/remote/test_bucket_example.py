"""A golden image in a bucket, as the example and the README do it, with a real object store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.mounted.test_readme import BUCKET, as_script, recipes
from tests.support import qemu
from tests.support.sandbox import ROOT, make_environment, run_in_sandbox

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.swift import Swift


def test_golden_image_in_a_bucket(store: Swift, tmp_path: Path) -> None:
    """Two overlays over one published image keep their own changes, and the object stays."""
    shown = run_in_sandbox(
        f"""
        {ROOT}/examples/install.sh --link "$1" 2>/dev/null
        mkdir /srv/scratch
        {ROOT}/examples/golden-image-in-a-bucket.sh s3://golden /srv/scratch
        ! findmnt --types fuse.qedfuse
        test -z "$(ls -A /srv/scratch)"
        """,
        make_environment(tmp_path / "installation"),
    )
    for line in ("web: release of web", "mail: release of mail", "bucket: release 1"):
        assert line in shown
    assert any(key.startswith("golden-example-") for key in store.keys("golden"))


def test_recipe_of_the_readme(store: Swift, tmp_path: Path) -> None:
    """The README's commands publish an image and write to an overlay over it."""
    image = qemu.create(tmp_path / "vm.qed", 4 << 20)
    qemu.io(image, "write -P 7 0 64k")
    shown = run_in_sandbox(
        f"""
        {ROOT}/examples/install.sh --link "$1" 2>/dev/null
        export XDG_CACHE_HOME=/srv/cache
        cp "$2" /srv/images
        {as_script(recipes()[BUCKET])}
        ! findmnt --types fuse.qedfuse
        rm vm.qed
        qedfuse -o overlay=vm1.qed s3://golden/vm.qed disk
        cmp -n 1024 disk/vm.raw <(head -c 1024 /dev/zero | tr '\\0' '\\7')
        dd if=disk/vm.raw bs=1 skip=1024 count=7 status=none
        qedfuse umount disk
        """,
        make_environment(tmp_path / "installation"),
        image,
    )
    assert "s3://golden/vm.qed" in shown
    assert shown.endswith("changed")
    assert "vm.qed" in store.keys("golden")
