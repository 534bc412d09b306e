"""Mounting by libfuse; the messages that it prints become the message of one error."""

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


class _RawOption(str):
    """An option that contains a file name; pyfuse3 would accept only ASCII in a plain str."""

    __slots__ = ()

    def encode(self, encoding: str = "", errors: str = "") -> bytes:  # noqa: ARG002  str's
        """Return the bytes of the file name, for any encoding."""
        return os.fsencode(str(self))  # without str() this method would call itself


def libfuse_options(options: MountOptions, source: str) -> set[str]:
    """Return the options for libfuse: for the mount table, and for the kernel to enforce."""
    found = {
        # Not escaped for display: mount(8) looks for the source in the mount table, and the
        # kernel escapes what that table shows.
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
    """Mount; return the descriptor of the connection to the kernel, which pyfuse3 owns.

    After an error nothing is mounted.

    Args:
        operations: The handlers of requests.
        mountpoint: The mountpoint.
        options: The options of the mount.
        source: The source for the mount table.

    Raises:
        PrivilegeError: The user may not mount.
        MountpointError: The kernel refuses the mountpoint.
        FuseError: It failed for another reason.
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
            said = captured()
        if failure is not None:
            raise _explain(mountpoint, said or str(failure)) from failure
        if said:
            with suppress(OSError):  # stderr is closed, or a pipe without a reader
                sys.stderr.write(f"qedfuse: {printable(said)}\n")
        new = fuse_descriptors() - before
        if len(new) != 1:
            msg = f"{printable(mountpoint)}: found {len(new)} connections, expected a new one"
            raise FuseError(msg)
        undo.pop_all()
        return new.pop()


def _explain(mountpoint: str, said: str) -> QedError:
    """Return an error of the class that matches the message of libfuse or fusermount3.

    They report the reason in no other way than by this text.
    """
    kind: type[QedError] = FuseError
    reason = said.replace(mountpoint, "")  # a path may contain any word
    if "ermission denied" in reason or "not permitted" in reason or "only allowed if" in reason:
        kind = PrivilegeError
    elif "ountpoint" in reason or "ransport endpoint" in reason:
        kind = MountpointError
    return kind(f"{printable(mountpoint)}: cannot mount: {printable(said)}")


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Capture what C code and child processes print on descriptor 2.

    The function that is yielded returns what has been captured, as one line.
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
