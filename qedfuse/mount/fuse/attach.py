"""Mounting with libfuse, and converting the messages that libfuse prints into one error."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final

import pyfuse3

from qedfuse.errors import FuseError, HostError, MountpointError, PrivilegeError, QedError
from qedfuse.mount.optionsyntax import escape_value
from qedfuse.mount.system.privileges import FUSE_DEVICE, can_gain_privileges
from qedfuse.text import printable
from qedfuse.util.descriptors import open_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.mount.fuse.operations import Operations
    from qedfuse.mount.options import MountOptions

_STDERR: Final = 2
_MAX_MESSAGE_BYTES: Final = 4096
"""Maximum number of bytes of libfuse's messages that an error shows."""


class _RawOption(str):
    """A mount option that may contain a file name with characters that are not ASCII.

    pyfuse3 calls the method ``encode`` of each option, and would encode a plain str as ASCII.
    """

    __slots__ = ()

    def encode(self, encoding: str = "", errors: str = "") -> bytes:  # noqa: ARG002  str's
        """Return the option with the bytes of the file name; both arguments are ignored."""
        return os.fsencode(str(self))  # os.fsencode of ``self`` would call this method again


def libfuse_options(options: MountOptions, source: str) -> set[str]:
    """Return the options for libfuse: names for the mount table, and flags for the kernel."""
    result = {
        # Not escaped with `printable`: mount(8) looks for the source itself in the mount table, and
        # the kernel escapes special characters.
        _RawOption(f"fsname={escape_value(source)}"),
        "subtype=qedfuse",
        "default_permissions",
        # Set in every mount, because no disk is a set-user-ID program or a device.
        "nosuid",
        "nodev",
        *options.kernel_flags,
    }
    if options.read_only:
        result.add("ro")
    if options.allow_other or options.allow_root:
        # The kernel does not know ``allow_root``; `MetadataOperations.admit` enforces it.
        result.add("allow_other")
    return result


def attach(operations: Operations, mountpoint: str, options: MountOptions, source: str) -> int:
    """Mount, and return the descriptor of the connection to the kernel.

    pyfuse3 owns the descriptor.  If an error is raised, nothing stays mounted.  If libfuse
    succeeds, what it prints is shown on stderr.

    Args:
        operations: The handlers of requests.
        mountpoint: The mountpoint, absolute and free of symbolic links.
        options: The options of the mount.
        source: The source for the mount table.

    Raises:
        PrivilegeError: The user may not mount.
        MountpointError: libfuse or the kernel refuses the mountpoint.
        FuseError: Mounting failed for another reason, or the connection cannot be found.
        HostError: /proc is not mounted, or the host refused a system call.
    """
    try:
        return _attach(operations, mountpoint, options, source)
    except OSError as error:
        raise HostError.from_os(error, printable(mountpoint), "cannot mount") from error


def _attach(operations: Operations, mountpoint: str, options: MountOptions, source: str) -> int:
    """Do what `attach` does; a refused system call raises OSError here."""
    before = _fuse_descriptors()
    failure = None
    with ExitStack() as undo:
        with _captured_stderr() as captured:
            try:
                pyfuse3.init(operations, mountpoint, libfuse_options(options, source))
                undo.callback(pyfuse3.close)  # unmounts
            except RuntimeError as error:
                failure = error
            printed = captured()
        if failure is not None:
            raise _explain(mountpoint, printed or str(failure)) from failure
        if printed:
            with suppress(OSError):  # stderr may be a pipe without a reader
                sys.stderr.write(f"qedfuse: {printable(printed)}\n")
        new = _fuse_descriptors() - before
        if len(new) != 1:
            shown = printable(mountpoint)
            msg = f"{shown}: found {len(new)} new connections to the kernel, expected one"
            raise FuseError(msg)
        undo.pop_all()
        return new.pop()


def disconnect(connection: int) -> None:
    """End the connection to the kernel, although libfuse's session still has its descriptor.

    The kernel then fails all requests with ECONNABORTED, those that were not answered included.
    Replies of requests that end later are dropped.  Call this only after `pyfuse3.terminate`, and
    when no other process has the connection open: the kernel ends it with the last descriptor.

    Raises:
        OSError: The host refuses a descriptor.
    """
    # /dev/null takes the place, because libfuse goes on to use the number until it closes it.
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.dup2(null, connection, inheritable=False)
    finally:
        os.close(null)


def _fuse_descriptors() -> set[int]:
    """Return the descriptors of this process that are open on the FUSE device."""
    on_device = set()
    for descriptor in open_descriptors():
        with suppress(OSError):  # a thread may have closed the descriptor in the meantime
            if os.readlink(f"/proc/self/fd/{descriptor}") == FUSE_DEVICE:  # noqa: PTH115
                on_device.add(descriptor)
    return on_device


def _explain(mountpoint: str, printed: str) -> QedError:
    """Return the error for a failed mount, in the class that the message of libfuse suggests.

    libfuse and fusermount3 report the reason in no other way.
    """
    error_class: type[QedError] = FuseError
    words = printed.replace(mountpoint, "")  # because a path may contain the words below
    # The first letters are left out, because they may be capital or small.
    if "ermission denied" in words or "not permitted" in words or "only allowed if" in words:
        error_class = PrivilegeError
        if not can_gain_privileges():
            printed += (
                " (no_new_privs is set, as by NoNewPrivileges= of systemd, and then fusermount3 has"
                " no more privileges than its user)"
            )
    elif "ountpoint" in words or "ransport endpoint" in words:
        error_class = MountpointError
    return error_class(f"{printable(mountpoint)}: cannot mount: {printable(printed)}")


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Capture what C code and child processes print to descriptor 2 in the block.

    Yields:
        A function that returns the lines captured so far as one line, cut to `_MAX_MESSAGE_BYTES`.
    """
    sys.stderr.flush()
    original = os.dup(_STDERR)
    try:
        # The output is kept in memory, because there may be no directory for temporary files.
        output = os.memfd_create("qedfuse-stderr")
    except OSError:
        os.close(original)
        raise
    with open(output, "rb") as file:  # noqa: PTH123  a descriptor
        os.dup2(file.fileno(), _STDERR)

        def captured() -> str:
            text = os.pread(file.fileno(), _MAX_MESSAGE_BYTES, 0).decode(errors="backslashreplace")
            return "; ".join(line.strip() for line in text.split("\n") if line.strip())

        try:
            yield captured
        finally:
            os.dup2(original, _STDERR)
            os.close(original)
