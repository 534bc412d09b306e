"""Opening the backing files of an image, as far as the policy for them allows.

An untrusted image can name any file that the user can read, and the guest would see its content.
So by default a base must lie inside the directory of the image that names it.  The policy is
applied to an open file and an open directory, not to their names, so symbolic links and renames
cannot evade it.  A URL is allowed or refused by its name, before a connection is made.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from qedfuse.disk.lookup.backingpath import MAX_CHAIN_DEPTH, backing_path
from qedfuse.disk.lookup.basepolicy import (
    checked_name,
    close_directory,
    is_named,
    is_same_url,
    open_local_base,
)
from qedfuse.disk.lookup.foreignopening import open_foreign, refuse_loop
from qedfuse.disk.lookup.imageopening import open_url
from qedfuse.disk.lookup.layer import QedLayer, RawLayer
from qedfuse.disk.lookup.rememberedbase import remembered_version, verify_bases
from qedfuse.errors import (
    BackingError,
    BackingRefusedError,
    CacheError,
    CorruptImageError,
    ForeignError,
    HostError,
    RemoteError,
    UsageError,
)
from qedfuse.hostio.imagefile import read_header
from qedfuse.hostio.locking import LockMode, lock_image
from qedfuse.ondisk.formats import SIGNATURE_BYTES, foreign_driver, foreign_format, is_qed
from qedfuse.remote.address import is_below, is_url, parse_address, shown_name
from qedfuse.text import printable
from qedfuse.util.deferredclose import close_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qedfuse.disk.lookup.layer import Layer
    from qedfuse.disk.lookup.tablecache import SliceStore
    from qedfuse.disk.options import BackingPolicy, OpenOptions
    from qedfuse.hostio.hostfile import FileIdentity, HostFile
    from qedfuse.ondisk.header import Header


async def read_backing_name(file: HostFile, header: Header) -> str:
    """Return the name that an image stores for its backing file; `backing_path` resolves it.

    The header must be that of an image with a backing file (`Header.has_backing`).

    Raises:
        CorruptImageError: The image ends before the end of the name.
        BackingRefusedError: The name contains a NUL byte, or begins with an unknown protocol.
        HostError: The host cannot read the image.
    """
    size = header.backing_filename_size
    raw = bytes(await file.pread(header.backing_filename_offset, size))
    if len(raw) < size:
        msg = (
            f"{file.name}: header field backing_filename_size: found {size}, expected at most "
            f"{len(raw)} (the file ends within the name)"
        )
        raise CorruptImageError(msg)
    return checked_name(raw, file.name)


async def open_bases(
    path: str,
    file: HostFile,
    header: Header,
    options: OpenOptions,
    store: SliceStore,
    *,
    name: str | None = None,
) -> list[Layer]:
    """Open the bases of an image, read-only; return their layers, from the first base downwards.

    The directory that was opened with ``file`` confines the first base; it is closed.

    An image can have a record of the versions of its bases.  The bases are compared with the
    records of the images above them (`verify_bases`).  If ``name`` is given, the record of ``file``
    is ignored.

    Args:
        path: The path or URL of the image.
        file: The image's open file.
        header: The image's header.
        options: The policy for bases, and whether to lock them.  The file that
            ``options.backing.trusted`` names is allowed as the first base wherever it lies.
        store: Holds the table slices of all layers.
        name: The name of the first base; None to read the name that the image stores.

    Raises:
        BackingError: A base is missing or refused, has a format that the policy does not allow, or
            is not of the remembered version.  Or the chain is a loop or too long.
        RemoteError: The server of a base cannot be reached, or does not serve the base.
        ImageError: A QED base is invalid or corrupt, or uses unknown features.
        ImageInUseError: A base is locked by another process.
        HostError: The host cannot read or lock a base, the cache for URLs cannot be used, or QEMU
            cannot serve a base in a format other than QED and raw.

    After any error all bases are closed.
    """
    layers: list[Layer] = []
    # The images above the base that is opened next, each with the name that it stores for its own
    # base.  If the name is empty, the versions that the image remembers are ignored.
    images = [] if name is None else [(file, "")]
    seen = {file.identity}
    trusted = options.backing.trusted
    base: HostFile | None = None
    try:
        while header.has_backing:
            if name is None:
                name = await read_backing_name(file, header)
            path = backing_path(path, name, options.backing.working_directory)
            if len(images) == len(layers):
                images.append((file, name))
            base = await open_base(path, file, options, trusted, images)
            close_directory(file)
            is_trusted = is_named(path, base, trusted)
            trusted = name = None
            _extend_chain(base, file.name, seen)
            with _prefixing_errors(file):
                # First, because another program could change the format until then.
                if options.lock and base.fileno() >= 0:
                    lock_image(base.fileno(), LockMode.READ, base.name)
                found = await _format_of(
                    base, file.name, header, options.backing, is_trusted=is_trusted
                )
                if found != "qed":
                    if found != "raw":
                        # The call owns the base.  After a cancellation a thread may still use it.
                        image, base = base, None
                        base = await _open_foreign_base(image, file.name, found, options)
                        refuse_loop(base, file.name, seen)
                    layers.append(RawLayer(base))
                    break
                header = await read_header(base)
                layer = QedLayer(base, header, store)
                await layer.scan_l1()
            layers.append(layer)
            file, base = base, None
        files = [layer.file for layer in layers]
        for opened in (file, *files):
            close_directory(opened)
        verify_bases(images, files, accept=options.backing.base_changed)
    except BaseException:
        files = [layer.file for layer in layers]
        with suppress(HostError):
            close_all(files if base is None else [base, *files])
        raise
    return layers


@contextmanager
def closing_layers(layers: list[Layer]) -> Iterator[list[Layer]]:
    """At the end of the ``with`` block, close the files of the layers that are in the list."""
    try:
        yield layers
    finally:
        close_all([layer.file for layer in layers])


@contextmanager
def _prefixing_errors(image: HostFile) -> Iterator[None]:
    """Put the name of an image before the message of a RemoteError or CacheError in the block."""
    try:
        yield
    except (RemoteError, CacheError) as error:
        about = f"{image.name}: backing file "
        raise error.prefixed(about) from error


def _extend_chain(base: HostFile, image: str, seen: set[FileIdentity]) -> None:
    """Add the identity of a base to ``seen``; refuse a chain that is a loop or too long."""
    identity = base.identity
    if identity in seen:
        msg = f"{image}: backing file {base.name}: found a loop in the chain"
        raise BackingError(msg)
    if len(seen) > MAX_CHAIN_DEPTH:
        msg = (
            f"{image}: backing file {base.name}: found a chain of more than {MAX_CHAIN_DEPTH} "
            "backing files"
        )
        raise BackingError(msg)
    seen.add(identity)


async def open_base(
    path: str,
    image: HostFile,
    options: OpenOptions,
    trusted: str | None,
    images: Sequence[tuple[HostFile, str]] = (),
) -> HostFile:
    """Open one backing file of ``image``, if the policy allows it.

    Args:
        path: The path or URL of the backing file.
        image: The image that names it.
        options: The policy, and how to read a URL.
        trusted: A path or URL that is allowed in any directory and on any server; None if there is
            no such path.  It is refused if the policy forbids all bases, or if it is a path and
            ``image`` is on a server.
        images: The images above the backing file; see `verify_bases`.  If the backing file is a
            URL and they remember its version, `open_url` tries to open that version, unless the
            policy accepts other versions.

    Raises:
        BackingError: The file is missing, is not a regular file, or cannot be opened, or the URL
            is not valid.
        RemoteError: The server cannot be reached, or does not serve the file.
        HostError: The backing file is a URL, and the cache for URLs cannot be used, or no
            descriptor is free.
        BackingRefusedError: The policy forbids the file.
    """
    if options.backing.mode == "none":
        msg = f"{image.name}: backing file {shown_name(path)}: refused by backing=none"
        raise BackingRefusedError(msg)
    if is_url(path):
        return await _open_url_base(path, image, options, trusted, images)
    if is_url(image.path):
        msg = (
            f"{image.name}: backing file {printable(path)}: refused: found a local file, expected "
            "a URL, because the image is on a server"
        )
        raise BackingRefusedError(msg)
    return open_local_base(path, image, options.backing, trusted)


async def _open_url_base(
    url: str,
    image: HostFile,
    options: OpenOptions,
    trusted: str | None,
    images: Sequence[tuple[HostFile, str]],
) -> HostFile:
    """Open a backing file that is a URL, if the user allows it; see `open_base`."""
    try:
        address = parse_address(url)
        if not is_same_url(address, trusted) and not any(
            is_below(address, prefix) for prefix in options.remote.allowed
        ):
            msg = (
                f"{image.name}: backing file {address.shown}: refused: found a URL, expected a "
                f"local file (allow it with backing_url={address.server})"
            )
            raise BackingRefusedError(msg)
        wanted = None
        if not options.backing.base_changed:
            wanted = remembered_version(images, address.url)
        with _prefixing_errors(image):
            return await open_url(url, options.remote, wanted)
    except UsageError as error:
        msg = f"{image.name}: backing file {error}"
        raise BackingError(msg) from error


async def _format_of(
    base: HostFile, image: str, header: Header, policy: BackingPolicy, *, is_trusted: bool
) -> str:
    """Return the format of a base as QEMU calls it.

    A format that the policy states counts first.  Then, if the header of the image forbids probing
    (BACKING_FORMAT_NO_PROBE), the base is raw, whatever its magic: a guest that writes to a raw
    disk can put any magic there.  Otherwise the magic counts.  A foreign format is then refused
    unless the policy allows it or the user has named the base.
    """
    if policy.format is not None:
        return policy.format
    if header.backing_is_raw:
        return "raw"
    signature = await base.pread(0, SIGNATURE_BYTES)
    driver = foreign_driver(signature)
    if driver is None:
        return "qed" if is_qed(signature) else "raw"
    if is_trusted or policy.foreign == "qemu":
        return driver
    msg = (
        f"{image}: backing file {base.name}: found a {foreign_format(signature)} image, expected "
        "QED or raw (foreign=qemu lets QEMU read it, backing_format=raw shows its bytes "
        "unchanged)"
    )
    raise BackingError(msg)


async def _open_foreign_base(
    base: HostFile, image: str, driver: str, options: OpenOptions
) -> HostFile:
    """Open a base in a foreign format with QEMU; return its disk.

    After an error or a cancellation the base is closed.
    """
    try:
        return await open_foreign(base, driver, options)
    except ForeignError as error:
        about = f"{image}: backing file "
        raise error.prefixed(about) from error
    except UsageError as error:
        msg = f"{image}: backing file {error}"
        raise BackingError(msg) from error
