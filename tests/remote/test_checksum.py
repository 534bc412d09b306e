"""Checksums of units: the extension and zlib give the same numbers, so caches can be shared."""

from __future__ import annotations

import random
import zlib

import pytest

from qedfuse.remote import unitfile
from tests.support.extensions import needs_extensions

pytestmark = needs_extensions


@pytest.mark.parametrize("start", [0, 1, 15])
def test_same_numbers_as_zlib(start: int) -> None:
    """All lengths around the steps of the extension, and long ones, from any initial value."""
    crc32 = pytest.importorskip("qedfuse.remote._crc32").crc32
    draw = random.Random(start)
    for length in [*range(260), 4095, 4096, 4097, (1 << 18) - 1, 1 << 18]:
        content = memoryview(draw.randbytes(start + length))[start:]
        value = draw.choice([0, 0xFFFFFFFF, draw.getrandbits(32)])
        assert crc32(content, value) == zlib.crc32(content, value)


def test_the_cache_uses_the_extension() -> None:
    """The checksum of a unit is computed by the extension where it is installed."""
    module = pytest.importorskip("qedfuse.remote._crc32")
    assert unitfile._crc32 is module.crc32
