"""The example of a golden image in a bucket, against a real object store."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
