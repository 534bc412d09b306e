"""A conversion from an open source to a pipe, an existing target or a new file."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from qedfuse.disk.lookup.baseversion import versions_of
from qedfuse.disk.lookup.rememberedbase import NewRecord
from qedfuse.errors import UsageError, cannot_open
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.hostio.newfile import NewFile
from qedfuse.hostio.regular import length_of, open_raw, status_of
from qedfuse.hostio.replacedfile import lock_replaced_file
from qedfuse.text import printable
from qedfuse.tools.common.formatprobe import probe_format
from qedfuse.tools.common.newbacking import refuse_backing_loop
from qedfuse.tools.common.pipe import open_stream
from qedfuse.tools.copying.compare import verify_copy
from qedfuse.tools.copying.diskcopy import DiskCopy, logging_partial_copy
from qedfuse.tools.copying.foreignimage import foreign_image
from qedfuse.tools.copying.imagespec import open_copy, open_new_base, qed_target
from qedfuse.tools.copying.streamcopy import copy_stream
from qedfuse.tools.target.qedtarget import ExistingQedTarget
from qedfuse.tools.target.rawtarget import ExistingRawTarget, NewRawTarget, StreamTarget

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from qedfuse.disk.options import OpenOptions
    from qedfuse.tools.common.pipe import Stream
    from qedfuse.tools.copying.diskcopy import WriteBehindMode
    from qedfuse.tools.copying.imagespec import ImageSpec
    from qedfuse.tools.source.source import Source
    from qedfuse.tools.target.target import Target
    from qedfuse.util.backgroundtasks import Progress


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """The result of a conversion, in bytes.

    Attributes:
        size: Size of the source's disk.
        file_bytes: Length of the target file or device; 0 for a pipe.
        data_bytes: Bytes that were copied as data; zeros that a file stores as holes or zero
            clusters do not count.
    """

    size: int
    file_bytes: int
    data_bytes: int


class RawStream(NamedTuple):
    """A raw stream as the source.

    Attributes:
        stream: The open stream.
        any_content: Whether the stream is accepted even if its first bytes are those of an image.
    """

    stream: Stream
    any_content: bool


class Conversion:
    """One conversion, by `to_pipe`, `to_existing` or `to_new`; the source must stay open."""

    def __init__(
        self,
        source: Source | RawStream,
        path: str,
        spec: ImageSpec,
        *,
        compare: bool,
        durable: bool,
        streams: int,
        options: OpenOptions,
        progress: Progress | None,
    ) -> None:
        """Prepare a conversion of ``source`` to ``path``; other arguments are as in `convert`."""
        self._source = source
        # None for a stream, which has no size and cannot be read again.
        self._source_disk = None if isinstance(source, RawStream) else source
        self._path = path
        self._name = printable(path)
        self._spec = spec
        self._compare = compare
        self._durable = durable
        self._streams = streams
        self._options = options
        self._progress = progress

    async def to_pipe(self) -> ConvertResult:
        """Write raw content to a pipe.

        Raises:
            UsageError: The target format is not raw, or a backing file or a comparison is
                wanted.
            BrokenPipeError: The reading end is closed.
            QedError: The source cannot be read, or the pipe cannot be opened or written.
        """
        if self._spec.format != "raw" or self._spec.backing is not None or self._compare:
            msg = f"{self._name}: found a pipe, which can only be written with -O raw and without "
            msg += "a backing file or --compare"
            raise UsageError(msg)
        stream = await open_stream(self._path, os.O_WRONLY)
        with closing(stream):
            size, data_bytes = await self._copy(StreamTarget(stream))
        return ConvertResult(size, 0, data_bytes)

    async def to_existing(self) -> ConvertResult:
        """Write over the content of an existing file, image or device.

        A longer target keeps its content past the end of the source's disk.

        Raises:
            UsageError: The target is too small.  Or raw content is wanted, and the target is an
                image or encrypted by LUKS.  Or a backing file or a foreign format is wanted.
            QedError: The source cannot be read, the target cannot be opened, locked or written, or
                the comparison found a difference.
        """
        spec = self._spec
        if spec.backing is not None or spec.format not in {"raw", "qed"}:
            msg = (
                f"{self._name}: found an existing target, which can only be written with -O raw "
                "or -O qed, and without a backing file"
            )
            raise UsageError(msg)
        if spec.format == "qed":
            size, file_bytes, data_bytes = await self._copy_to_image()
        else:
            size, file_bytes, data_bytes = await self._copy_to_raw_file()
        if self._compare:
            await self._verify(self._path)
        return ConvertResult(size, file_bytes, data_bytes)

    async def to_new(self, *, overwrite: bool) -> ConvertResult:
        """Create a new file, which gets its name when it is complete.

        Args:
            overwrite: Whether to replace an existing file.

        Raises:
            UsageError: The file exists, and ``overwrite`` is False or the file is not regular.  Or
                the format permits no backing file or comparison, or is one that cannot be written.
                Or the geometry is invalid or too small for the disk.
            BackingError: The backing file cannot be used, or leads to the target itself.
            ImageInUseError: The old file is in use, or another file has taken the name meanwhile.
            QedError: The source cannot be read, the file cannot be written, or the comparison
                found a difference.
        """
        spec = self._spec
        if spec.backing is not None and spec.format != "qed":
            msg = (
                f"{self._name}: found format {spec.format} with a backing file, expected "
                "qed (qemu-img convert -B makes overlays of other formats)"
            )
            raise UsageError(msg)
        if spec.backing is not None:
            directory = self._options.backing.working_directory
            refuse_backing_loop(self._path, spec.backing, directory)
        record = NewRecord("", None)
        with ExitStack() as stack:
            old = lock_replaced_file(self._path, stack, overwrite=overwrite, offers_in_place=True)
            new = stack.enter_context(NewFile(self._path, old=old, overwrite=overwrite))
            if spec.format not in {"raw", "qed"}:
                size, data_bytes = await self._copy_through_qemu(new)
            else:
                try:
                    fd = os.open(new.path, os.O_RDWR | os.O_CLOEXEC)
                except OSError as error:
                    raise cannot_open(self._path, error) from error
                stack.callback(os.close, fd)
                async with self._new_target(fd) as (target, base):
                    if base is not None:
                        # The versions of the base are read before the copy.  Versions read later
                        # would hide a change of the base during the copy.
                        record = NewRecord(spec.backing or "", versions_of(base.layer_files()))
                        record.store(fd)
                    size, data_bytes = await self._copy(target, base)
                if self._compare:
                    await self._verify(new.path)
            new.commit(durable=self._durable)
            record.finish(self._path)
        return ConvertResult(size, status_of(self._path, self._name).st_size, data_bytes)

    async def _copy(self, target: Target, base: Source | None = None) -> tuple[int, int]:
        """Copy the disk and complete the target; return the size and the bytes copied as data."""
        sparse_size = self._spec.sparse_size
        if isinstance(self._source, RawStream):
            stream, any_content = self._source
            return await copy_stream(
                stream,
                target,
                sparse_size=sparse_size,
                any_content=any_content,
                progress=self._progress,
            )
        write_behind: WriteBehindMode = "wait" if self._durable else "if fast"
        if self._spec.format not in {"raw", "qed"}:
            # The target is a temporary file that qemu-img reads next, so its pages stay cached.
            write_behind = "off"
        copy = DiskCopy(
            self._source,
            target,
            base=base,
            sparse_size=sparse_size,
            write_behind=write_behind,
            progress=self._progress,
        )
        await copy.run(self._streams)
        return self._source.size, copy.data_bytes

    async def _copy_to_image(self) -> tuple[int, int, int]:
        """Copy to an existing QED image; return size of disk, length of file, bytes of data."""
        # Imported late, because loading the module takes time that other targets do not need.
        from qedfuse.tools.common.writabledisk import open_writable  # noqa: PLC0415  late, see above

        options = replace(self._options, force_share=False)
        async with open_writable(self._path, options) as disk:
            self._refuse_too_small(disk.size)
            with logging_partial_copy(self._name):
                size, data_bytes = await self._copy(ExistingQedTarget(disk))
            length = disk.fstat().st_size
        with suppress(OSError):
            # The close has perhaps cut off free clusters, or stored a free list.
            length = os.stat(self._path).st_size  # noqa: PTH116  a name, not a Path
        return size, length, data_bytes

    async def _copy_to_raw_file(self) -> tuple[int, int, int]:
        """Copy to an existing file or device; return the same numbers as `_copy_to_image`."""
        expected = "raw content (qemu-img convert -n can write into an image of this format)"
        if probe_format(self._path, expected) == "qed":
            msg = (
                f"{self._name}: found a QED image, expected raw content (-O qed writes into the "
                "image)"
            )
            raise UsageError(msg)
        fd = open_raw(self._path, os.O_RDWR)
        try:
            if self._options.lock:
                lock_image(fd, LockMode.WRITE, self._name)
            length = length_of(fd, self._name)
            self._refuse_too_small(length)
            target = ExistingRawTarget(fd, self._name, durable=self._durable)
            with logging_partial_copy(self._name):
                size, data_bytes = await self._copy(target)
            return size, length, data_bytes
        finally:
            os.close(fd)

    def _refuse_too_small(self, size: int) -> None:
        """Raise UsageError if the source is larger than the target, which has ``size`` bytes."""
        if self._source_disk is not None and size < self._source_disk.size:
            expected = self._source_disk.size
            msg = f"{self._name}: size: found {size}, expected at least {expected}"
            raise UsageError(msg)

    @asynccontextmanager
    async def _new_target(self, fd: int) -> AsyncIterator[tuple[Target, Source | None]]:
        """Yield the target for the empty file ``fd``, and its open base or None."""
        spec = self._spec
        if spec.format == "raw":
            yield NewRawTarget(fd, self._name, spec.sparse_size), None
            return
        async with AsyncExitStack() as stack:
            base = None
            if spec.backing is not None:
                base = await stack.enter_async_context(
                    open_new_base(self._path, spec, self._options)
                )
            yield qed_target(fd, self._name, spec, self._source_disk, base), base

    async def _copy_through_qemu(self, new: NewFile) -> tuple[int, int]:
        """Copy to a temporary raw file, which qemu-img then converts into the new file."""
        spec = self._spec
        if self._compare:
            msg = f"{self._name}: --compare: found format {spec.format}, expected raw or qed"
            raise UsageError(msg)
        image = foreign_image(
            self._path, new.path, spec.format, spec.foreign_options, spec.sparse_size
        )
        async with image as fd:
            return await self._copy(NewRawTarget(fd, self._name, spec.sparse_size))

    async def _verify(self, path: str) -> None:
        """Compare the copy, now at ``path``, with the source; a stream is skipped."""
        if self._source_disk is not None:
            async with open_copy(path, self._path, self._spec, self._options) as copy:
                await verify_copy(self._source_disk, copy, self._name)
