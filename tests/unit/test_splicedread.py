"""Reads of local files for which the kernel takes pages of its page cache (``_validpages.c``)."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import subprocess
import sys
from array import array
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.disk.space.epochs import Epochs
from qedfuse.hostio.pagesource import PageSource
from qedfuse.hostio.readpolicy import ReadPolicy
from qedfuse.hostio.systemcalls import inline_flags
from qedfuse.mount.fuse import extraops
from tests.support.fusewire import session_of
from tests.support.programs import TREE, environment
from tests.support.readsession import Session
from tests.support.refusedcalls import CACHESTAT, MINCORE, run_without

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(
    extraops._extension is None, reason=f"no extension: {extraops._load_error}"
)

CLUSTER_BITS: Final = 16
CLUSTER: Final = 1 << CLUSTER_BITS
SLICE_BITS: Final = 4
FILE_BYTES: Final = CLUSTER << SLICE_BITS
LONG: Final = 1 << 18
"""The length from which mincore(2) is asked."""


class File:
    """A file that the extension reads, and whose content is known.

    Attributes:
        content: The content of the file.
    """

    def __init__(self, path: Path, session: Session, cleanup: ExitStack) -> None:
        """Write the file, and show it as a disk that begins with the file's second cluster."""
        self._session = session
        self.content = os.urandom(FILE_BYTES)
        path.write_bytes(self.content)
        self._fd = os.open(path, os.O_RDONLY)
        cleanup.callback(os.close, self._fd)
        os.fsync(self._fd)
        self.show()

    def show(self) -> None:
        """Show the file to the extension."""
        entries = SimpleNamespace(
            entries=array("Q", [CLUSTER * (index + 1) for index in range(1 << SLICE_BITS)]),
            bad=None,
        )
        header = SimpleNamespace(image_size=FILE_BYTES - CLUSTER, l1_table_offset=1 << 40)
        source = PageSource(ReadPolicy(), self._fd, flags=inline_flags(self._fd))
        view = (
            *(SimpleNamespace(header=header), {0: 0}, {0: entries}.get, None, (source,)),
            *(CLUSTER_BITS, SLICE_BITS, Epochs(), array("Q", bytes(16))),
        )
        self._session.show(*view)

    def is_spliced(self, offset: int, size: int) -> bool:
        """Read a range, whose bytes must be right; return whether it was spliced."""
        before = self._session.wire.spliced
        data = self._session.read(offset, size)
        assert data == self.content[CLUSTER + offset : CLUSTER + offset + size]
        return self._session.wire.spliced > before

    def error(self, offset: int, size: int) -> int:
        """Read a range that cannot be read; return the errno of the answer."""
        self._session.wire.answers.clear()
        self._session.send(offset, size)
        ((_number, error, _data),) = self._session.wire.answers
        return -error

    def miss(self) -> None:
        """Send a read that the extension cannot answer."""
        assert self._session.read(FILE_BYTES, 1) is None


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    """Show a file from which reads are spliced."""
    with ExitStack() as cleanup, session_of(Session(can_splice=True)) as session:
        yield File(tmp_path / "file", session, cleanup)


def test_pages_that_were_read_are_spliced(file: File) -> None:
    """A first read copies, which shows that its pages are valid; then exactly these are spliced."""
    assert not file.is_spliced(4096, CLUSTER)
    assert file.is_spliced(4096, CLUSTER)
    assert file.is_spliced(8192, CLUSTER // 2)
    assert not file.is_spliced(0, CLUSTER)
    assert file.is_spliced(0, CLUSTER + 4096), "all of its pages were read by one or the other"
    assert not file.is_spliced(CLUSTER, CLUSTER), "its last page was not read"
    assert not file.is_spliced(3 * CLUSTER + 100, CLUSTER), "it begins within a page"
    assert file.is_spliced(3 * CLUSTER + 100, CLUSTER)


def test_a_request_that_waits_ends_the_trust_in_pages(file: File) -> None:
    """Pages can have left the page cache by then, and the kernel can be reading them again."""
    assert not file.is_spliced(0, CLUSTER)
    file.miss()
    assert not file.is_spliced(0, CLUSTER)
    assert file.is_spliced(0, CLUSTER)


def test_a_new_view_ends_the_trust_in_pages(file: File) -> None:
    """Its descriptors can be those of files that were closed."""
    assert not file.is_spliced(0, CLUSTER)
    file.show()
    assert not file.is_spliced(0, CLUSTER)


def test_a_long_first_read_is_spliced_if_the_kernel_names_valid_pages(file: File) -> None:
    """For a long read mincore(2) is asked; without it the read is copied."""
    assert not run_without(MINCORE, lambda: file.is_spliced(0, LONG))
    file.miss()
    assert file.is_spliced(0, LONG)
    assert file.is_spliced(CLUSTER, CLUSTER), "all of its pages have been found valid"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_no_page_is_spliced_untried_if_the_kernel_names_none(file: File) -> None:
    """To a user who may not write to the file, mincore(2) reports every page as valid."""
    os.seteuid(65534)
    try:
        assert not file.is_spliced(0, LONG)
    finally:
        os.seteuid(0)


@contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    """Lower a limit of this process for the block."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def address_space() -> int:
    """Return the size in bytes of the address space of this process."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[0]) * mmap.PAGESIZE


def check_after_failed_answer(directory: str) -> None:
    """Make an answer fail after the pages of the file are in the pipe; read again."""
    length = 2 * LONG  # so long that only the kernel has the memory
    with ExitStack() as cleanup, session_of(Session(can_splice=True)) as session:
        file = File(Path(directory, "file"), session, cleanup)
        for offset in range(0, length, CLUSTER):
            assert not file.is_spliced(offset, CLUSTER)
        # Only two descriptors are left, for the pipe of the extension.  libfuse, which gets no pipe
        # of its own, then needs memory for the data.
        taken = {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208  the names alone
        free = [number for number in range(max(taken) + 4) if number not in taken]
        with (
            limited(resource.RLIMIT_NOFILE, free[1] + 1),
            limited(resource.RLIMIT_AS, address_space()),
        ):
            assert file.error(0, length) == errno.ENOMEM
        assert file.is_spliced(CLUSTER, CLUSTER)
        assert file.is_spliced(0, length)


def test_pages_of_a_failed_answer_are_not_in_the_next_one(tmp_path: Path) -> None:
    """If libfuse answers with an error, it may leave the pages in the pipe, and returns success."""
    call = f"check_after_failed_answer({os.fspath(tmp_path)!r})"
    # With these settings each long piece of memory comes from the kernel.
    memory = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    subprocess.run(
        [sys.executable, "-c", f"from {__name__} import *\n{call}"],
        check=True,
        cwd=TREE,
        env={**environment(), **memory},
    )


def test_nothing_is_spliced_without_cachestat(file: File) -> None:
    """Before Linux 6.5 each read is copied."""
    assert not file.is_spliced(0, CLUSTER)
    assert not run_without(CACHESTAT, lambda: file.is_spliced(0, CLUSTER))
