"""The example of docs/format-extensions.md and the messages in docs/bad-input.md are true."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import qedfuse
from qedfuse.ondisk import freelist
from qedfuse.ondisk.constants import Feature
from tests.support.disks import WRITABLE, build_image, opened, pattern
from tests.support.freelists import DESCRIPTOR, leaked_runs, put_list, set_bit
from tests.support.hostfiles import MemoryFile
from tests.unit.test_freelist import image, refused

if TYPE_CHECKING:
    from collections.abc import Callable

DOCS: Final = Path(qedfuse.__file__).parents[1] / "docs"
DOCUMENT: Final = DOCS / "format-extensions.md"
BAD_INPUT: Final = DOCS / "bad-input.md"
CLUSTER: Final = 4096


def dump(content: bytes | bytearray, offset: int, length: int) -> list[str]:
    """Return bytes as the document shows them: file offset, sixteen bytes in hexadecimal."""
    return [
        f"{at:08x}  {content[at : at + 8].hex(' ')}  {content[at + 8 : at + 16].hex(' ')}"
        for at in range(offset, offset + length, 16)
    ]


async def test_the_example() -> None:
    """Seven writes and four discards give the bytes that the document shows."""
    file = MemoryFile(build_image(16 * CLUSTER))
    async with opened(file, options=replace(WRITABLE, free_list="on")) as disk:
        await disk.write(0, pattern(7 * CLUSTER, 1))
        await disk.flush()
        await disk.discard(0, CLUSTER)
        await disk.discard(2 * CLUSTER, 3 * CLUSTER)
    text = DOCUMENT.read_text()
    shown = [
        *dump(file.content, 16, 16),
        *dump(file.content, freelist.DESCRIPTOR_OFFSET, 64),
        *dump(file.content, freelist.DESCRIPTOR_END - 16, 16),
        *dump(file.content, 3 * CLUSTER, 64),
    ]
    missing = [line for line in shown if line not in text]
    assert not missing, "\n".join(shown)
    assert len(file.content) == 10 * CLUSTER


def test_the_numbers() -> None:
    """The document's feature bit, offsets and sizes are those of the code."""
    text = DOCUMENT.read_text()
    for number in (
        f"0x{Feature.FREE_LIST:016x}",
        f"byte {freelist.DESCRIPTOR_OFFSET}",
        f"`{freelist.MAGIC.decode()}`",
        f"`{freelist.CLUSTER_MAGIC.decode()}`",
    ):
        assert number in text, number


def patch(offset: int, data: bytes) -> Callable[[bytearray], None]:
    """Make a true list, and then overwrite some bytes."""

    def change(content: bytearray) -> None:
        put_list(content)
        content[offset : offset + len(data)] = data

    return change


def extra_run(content: bytearray) -> None:
    """List the L1 table."""
    good = leaked_runs(content)
    put_list(content, [(1, 1), *good], [good[0][0]])


def descend(content: bytearray) -> None:
    """List runs in the wrong order."""
    good = leaked_runs(content)
    put_list(content, [*good[1::-1], *good[2:]], [good[0][0]])


ROWS: Final[dict[str, Callable[[bytearray], None]]] = {
    "nothing": set_bit,
    "damage": patch(DESCRIPTOR + 16, b"x"),
    "version": lambda content: put_list(content, version=2),
    "length": lambda content: put_list(content, file_bytes=CLUSTER),
    "need_check": patch(16, b"\2"),
    "count": lambda content: put_list(content, runs=1 << 63),
    "chain": lambda content: put_list(content, list_clusters=2),
    "stray": lambda content: put_list(content, None, [leaked_runs(content)[0][0] - 1]),
    "order": descend,
    "table": extra_run,
}


def numbers_aside(text: str) -> str:
    """Make messages about different images comparable."""
    return re.sub(r"\b(0x[0-9a-f]+|[0-9a-f]{16}|\d+)\b", "N", text)


@pytest.mark.parametrize("row", ROWS)
async def test_the_messages(row: str) -> None:
    """The message about each kind of defective list is in the table."""
    content = image()
    ROWS[row](content)
    message = await refused(content)
    known = numbers_aside(BAD_INPUT.read_text())
    assert f"`{numbers_aside(message).replace('image:', 'bad.qed:', 1)}`" in known
