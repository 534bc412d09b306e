"""Silence of a remote file's server: begun by a fill that fails, ended by any answer."""

from __future__ import annotations

import pytest
import trio

from qedfuse.errors import RemoteError
from qedfuse.hostio.serversilence import Fill
from qedfuse.remote.fetcher import Fetcher
from qedfuse.remote.remotefile import RemoteFile
from qedfuse.remote.unitfile import UNIT_BYTES
from tests.support.remotes import HeldObject, read, some_bytes


async def fill_unit(file: RemoteFile, unit: int) -> None:
    """Read a unit as a fill does."""
    with Fill().running():
        await file.pread(unit * UNIT_BYTES, 10)


@pytest.mark.expect_log("what is not in the cache")
@pytest.mark.expect_log("answers again")
def test_silence_begins_with_a_fill_and_ends_with_an_answer() -> None:
    """Only a fill that fails begins the silence, and the answer to any read ends it."""
    source = HeldObject(some_bytes(40))
    file = RemoteFile(source, Fetcher(source, None), None)  # type: ignore[arg-type]
    try:
        source.errors[10] = RemoteError("out")
        with pytest.raises(RemoteError, match="out"):
            read(file, 10 * UNIT_BYTES, 10)
        source.errors[20] = RemoteError("out")
        with pytest.raises(RemoteError, match="out"):
            trio.run(file.pread, 20 * UNIT_BYTES, 10)
        assert file.silence._failure is None
        source.errors[30] = RemoteError("fill")
        with pytest.raises(RemoteError, match="fill"):
            trio.run(fill_unit, file, 30)
        assert str(file.silence._failure) == "fill"
        read(file, 0, 10)
        assert file.silence._failure is None
    finally:
        file.close()
