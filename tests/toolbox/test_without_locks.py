"""``OpenOptions.lock`` as the functions of the toolbox keep it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
import trio

from qedfuse.disk.options import OpenOptions
from qedfuse.errors import ImageInUseError
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.tools.copying.convert import convert
from qedfuse.tools.copying.imagespec import ImageSpec
from qedfuse.tools.copying.measure import measure
from qedfuse.tools.editing.commit import commit
from qedfuse.tools.editing.compact import compact
from qedfuse.tools.editing.freelist import drop, enable
from qedfuse.tools.editing.rebase import rebase
from qedfuse.tools.editing.resize import resize
from qedfuse.tools.inspection.chaininfo import describe_chain
from qedfuse.tools.inspection.details import read_details
from qedfuse.tools.inspection.info import describe
from qedfuse.tools.inspection.mapping import map_image
from tests.support.disks import build_image, l2_entry_offset, pattern, put_entry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

CLUSTER_BYTES: Final = 4096
DISK_BYTES: Final = 16 * CLUSTER_BYTES
WITHOUT: Final = OpenOptions(lock=False)


async def details(options: OpenOptions) -> object:
    """Read the tables and the free list of ``listed.qed``."""
    return await read_details(describe("listed.qed", lock=None), options, allocation=True)


async def listing(options: OpenOptions) -> object:
    """Read the free list of ``listed.qed``, and not its tables."""
    return await read_details(describe("listed.qed", lock=None), options)


async def convert_to(target: str, form: str, options: OpenOptions) -> object:
    """Write a raw file into an existing target."""
    return await convert("source.raw", target, ImageSpec(form), into_existing=True, options=options)


CALLS: Final[dict[str, Callable[[OpenOptions], Awaitable[object]]]] = {
    "convert": lambda options: convert("top.qed", "new.qed", options=options),
    "convert-into-raw": partial(convert_to, "target.raw", "raw"),
    "convert-into-qed": partial(convert_to, "image.qed", "qed"),
    "convert-compared": lambda options: convert(
        "source.raw",
        "target.raw",
        ImageSpec("raw"),
        into_existing=True,
        compare=True,
        options=options,
    ),
    "measure": lambda options: measure("top.qed", ImageSpec(), options=options),
    "commit": lambda options: commit("top.qed", options=options),
    "commit-lower": lambda options: commit("top.qed", base="image.qed", options=options),
    "compact": lambda options: compact("image.qed", options),
    "free-list-on": lambda options: enable("image.qed", options),
    "free-list-off": lambda options: drop("listed.qed", options),
    "rebase": lambda options: rebase("top.qed", None, options=options),
    "resize": lambda options: resize("image.qed", 2 * DISK_BYTES, options=options),
    "chain": lambda options: describe_chain("top.qed", options=options),
    "details": details,
    "list": listing,
    "map": lambda options: map_image("top.qed", options=options),
}


@pytest.mark.parametrize("name", CALLS)
def test_without_locks_no_other_lock_matters(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call with ``lock`` False takes no locks, so it succeeds beside programs that hold them."""
    monkeypatch.chdir(tmp_path)
    image = build_image(DISK_BYTES, {n: pattern(CLUSTER_BYTES, n) for n in range(4)})
    put_entry(image, l2_entry_offset(image, 1), 0)
    (tmp_path / "image.qed").write_bytes(image)
    (tmp_path / "listed.qed").write_bytes(image)
    trio.run(enable, "listed.qed")
    top = build_image(DISK_BYTES, {5: pattern(CLUSTER_BYTES, 5)}, backing=b"image.qed")
    (tmp_path / "top.qed").write_bytes(top)
    (tmp_path / "source.raw").write_bytes(pattern(DISK_BYTES, 9))
    (tmp_path / "target.raw").write_bytes(bytes(DISK_BYTES))
    call = CALLS[name]
    with ExitStack() as stack:
        for path in tmp_path.iterdir():
            fd = os.open(path, os.O_RDWR)
            stack.callback(os.close, fd)
            lock_image(fd, LockMode.WRITE, path.name)
        with pytest.raises(ImageInUseError):
            trio.run(call, OpenOptions())
        trio.run(call, WITHOUT)
