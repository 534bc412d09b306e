"""A cache of nginx between the machines and the store, configured as docs/remote.md recommends."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from qedfuse.errors import ObjectChangedError
from tests.support.nginx import serving_cache
from tests.support.remotes import opened, read, some_bytes
from tests.support.sandbox import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.nginx import Nginx

MIB = 1 << 20
SLICES = 12
"""Number of ranges in which nginx fetches the object."""
CONTENT = some_bytes(4 * SLICES - 0.5)
NAME = "/golden.raw"


@pytest.fixture
def url(nginx: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give the URL of an object in an empty cache of nginx."""
    (nginx.directory / NAME[1:]).write_bytes(CONTENT)
    with serving_cache(tmp_path / "between", nginx) as (cache, certificate):
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        yield cache + NAME


def test_what_one_machine_has_read_reaches_the_store_no_more(
    nginx: Nginx, url: str, tmp_path: Path
) -> None:
    """A second machine that reads in another order costs the store one request: the opening."""
    before = nginx.requests(NAME)
    with opened(url, tmp_path / "one") as file:
        assert read(file, 0, len(CONTENT)) == CONTENT
    first = nginx.requests(NAME)[len(before) :]
    assert sorted(first) == sorted([(206, 1), (206, MIB - (1 << 17))] + [(206, MIB)] * (SLICES - 1))
    with opened(url, tmp_path / "two") as file:
        for offset in range(len(CONTENT) - 65536 - 999, 0, -500_000):
            assert read(file, offset, 65536) == CONTENT[offset : offset + 65536]
        assert file.fetcher.requests > SLICES
    assert nginx.requests(NAME)[len(before) + len(first) :] == [(206, 1)]


@pytest.mark.expect_log("found another version of the object than the one in use")
@pytest.mark.expect_log("answers again")
def test_versions_are_never_mixed(nginx: Nginx, url: str, tmp_path: Path) -> None:
    """After an overwrite, the cache still has the old ranges for readers of the old version only.

    A reader of the new version gets the new bytes, and a reader of the old version gets an error
    for what the cache does not have, also if a part of the range is in the cache.
    """
    with ExitStack() as stack:
        one = stack.enter_context(opened(url, tmp_path / "one"))
        assert read(one, 0, 2 * MIB) == CONTENT[: 2 * MIB]
        old = stack.enter_context(opened(url, tmp_path / "old"))
        (nginx.directory / NAME[1:]).write_bytes(CONTENT[::-1])
        # nginx makes its ETag from the length and the whole seconds of this time.
        os.utime(nginx.directory / NAME[1:], (1_000_000_000, 1_000_000_000))
        new = stack.enter_context(opened(url, tmp_path / "new"))
        assert read(new, 0, 3 * MIB) == CONTENT[::-1][: 3 * MIB]
        before = nginx.requests(NAME)
        assert read(old, 0, MIB) == CONTENT[:MIB]
        assert nginx.requests(NAME) == before
        for offset in (10 * MIB, 2 * MIB - 65536 * 6):
            with pytest.raises(ObjectChangedError):
                read(old, offset, MIB)
        assert read(old, MIB // 2, MIB) == CONTENT[MIB // 2 : MIB // 2 + MIB]
        assert read(new, 0, len(CONTENT)) == CONTENT[::-1]


def test_configuration_is_named() -> None:
    """The guide names the configuration that these tests use."""
    assert "(../examples/nginx-cache.conf)" in (ROOT / "docs/remote.md").read_text("utf-8")
