"""The fast check and the fast map, of which C code reads the tables; the inputs are images."""

from __future__ import annotations

import json
from typing import Final

from qedfuse.check.fastcheck import fast_check
from qedfuse.tools.inspection.fastmap import open_fast_map
from tests.fuzz.targets import image
from tests.fuzz.targets.scratch import put, scratch
from tests.fuzz.targets.target import Target
from tests.support.disks import inspect_image


def check(data: bytes) -> None:
    """Check and map an image; what is vouched for must be sound for an independent reader."""
    content = image.file_of(data)
    path = put(scratch("fasttables") / "image.qed", content)
    found = fast_check(path)
    if found is not None:
        inspected = inspect_image(content)
        assert not inspected.errors, inspected.errors
        assert not inspected.leaked, "the fast check has missed leaked clusters"
        header, size, report = found
        assert size == len(content)
        assert report.file_clusters == size // header.cluster_size
    for as_json in (True, False):
        with open_fast_map(path) as fast_map:
            if fast_map is None:
                continue
            text = "".join(fast_map.lines(as_json=as_json, name="image.qed"))
            assert 0 <= fast_map.reached <= fast_map.size
            if not as_json:
                assert all(line.endswith("image.qed") for line in text.splitlines())
                continue
            end = 0
            for entry in json.loads(f"[{text.removeprefix(',')}]"):
                assert entry["start"] == end
                assert entry["length"] > 0
                end += entry["length"]
            assert end == fast_map.reached


TARGET: Final = Target(check, image.seeds, image.TOKENS, uses_c=True)
