"""Mounting with libfuse, and converting the messages that libfuse prints into one error."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final

import pyfuse3

from qedfuse.errors import FuseError, MountpointError, PrivilegeError, QedError
from qedfuse.mount.fuse.fuseinit import fuse_descriptors
from qedfuse.mount.optionsyntax import escape_value
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qedfuse.mount.fuse.operations import Operations
    from qedfuse.mount.options import MountOptions

_STDERR: Final = 2
_MAX_MESSAGE_BYTES: Final = 4096
"""Most bytes of libfuse's messages that an error shows."""


class _RawOption(str):
    """An option that contains a file name, which pyfuse3 accepts also if it is not ASCII.

    pyfuse3 calls the method ``encode`` of each option, and would encode a plain str as ASCII.
    """

    __slots__ = ()

    def encode(self, encoding: str = "", errors: str = "") -> bytes:  # noqa: ARG002  str's
        """Return the bytes of the file name, for any encoding."""
        return os.fsencode(str(self))  # without str() this method would call itself


def libfuse_options(options: MountOptions, source: str) -> set[str]:
    """Return the options for libfuse.

    They are the source and the type that the mount table shows, and the flags that the kernel
    enforces.
    """
    found = {
        # The source is not escaped with `printable`, because mount(8) looks for it in the
        # mount table, for which the kernel does the escaping.
        _RawOption(f"fsname={escape_value(source)}"),
        "subtype=qedfuse",
        "default_permissions",
        # Set-user-ID programs and devices of an untrusted image must have no effect, so the
        # user cannot turn these off.
        "nosuid",
        "nodev",
        *options.kernel_flags,
    }
    if options.read_only:
        found.add("ro")
    if options.allow_other or options.allow_root:
        found.add("allow_other")
    return found


def attach(operations: Operations, mountpoint: str, options: MountOptions, source: str) -> int:
    """Mount, and return the descriptor of the connection to the kernel, which pyfuse3 owns.

    If an error is raised, nothing is mounted.  What libfuse prints without an error is shown
    on stderr.

    Args:
        operations: The handlers of requests.
        mountpoint: The mountpoint.
        options: The options of the mount.
        source: The source for the mount table.

    Raises:
        PrivilegeError: The user may not mount.
        MountpointError: The kernel refuses the mountpoint.
        FuseError: Mounting failed for another reason.
    """
    before = fuse_descriptors()
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
            with suppress(OSError):  # stderr is closed, or a pipe without a reader
                sys.stderr.write(f"qedfuse: {printable(printed)}\n")
        new = fuse_descriptors() - before
        if len(new) != 1:
            shown = printable(mountpoint)
            msg = f"{shown}: found {len(new)} new connections to the kernel, expected one"
            raise FuseError(msg)
        undo.pop_all()
        return new.pop()


def _explain(mountpoint: str, printed: str) -> QedError:
    """Return an error of the class that matches the message of libfuse or fusermount3.

    The class depends on words of the message, because libfuse and fusermount3 report the
    reason in no other way.
    """
    kind: type[QedError] = FuseError
    reason = printed.replace(mountpoint, "")  # the path may contain the words
    if "ermission denied" in reason or "not permitted" in reason or "only allowed if" in reason:
        kind = PrivilegeError
    elif "ountpoint" in reason or "ransport endpoint" in reason:
        kind = MountpointError
    return kind(f"{printable(mountpoint)}: cannot mount: {printable(printed)}")


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Capture what C code and child processes print to descriptor 2 in the block.

    Yields:
        A function that returns what has been captured so far, as one line.
    """
    sys.stderr.flush()
    original = os.dup(_STDERR)
    # In memory, because there may be no directory for temporary files.
    with open(os.memfd_create("qedfuse-stderr"), "rb") as file:  # noqa: PTH123  a descriptor
        os.dup2(file.fileno(), _STDERR)

        def captured() -> str:
            text = os.pread(file.fileno(), _MAX_MESSAGE_BYTES, 0).decode(errors="backslashreplace")
            return "; ".join(line.strip() for line in text.split("\n") if line.strip())

        try:
            yield captured
        finally:
            os.dup2(original, _STDERR)
            os.close(original)
