"""Attaching to the kernel: libfuse mounts, and what it prints becomes one line of ours."""

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
_MAX_CHATTER: Final = 4096


class _RawOption(str):
    """An option in the bytes of a file name, where pyfuse3 takes only ASCII."""

    __slots__ = ()

    def encode(self, encoding: str = "", errors: str = "") -> bytes:  # noqa: ARG002  str's
        """Return the bytes of the file name, whatever encoding pyfuse3 asks for."""
        return os.fsencode(str(self))  # of itself it would call this method


def kernel_options(options: MountOptions, source: str) -> set[str]:
    """Build libfuse's options: what the mount table shows, and what the kernel enforces."""
    words = {
        # As it is, since mount(8) looks for it in the mount table, which escapes it itself.
        _RawOption(f"fsname={escape_value(source)}"),
        "subtype=qedfuse",
        "default_permissions",
        # Files named by an image must not gain powers, so these are not up to the user.
        "nosuid",
        "nodev",
        *options.kernel_flags,
    }
    if options.read_only:
        words.add("ro")
    if options.allow_other or options.allow_root:
        words.add("allow_other")
    return words


def attach(operations: Operations, mountpoint: str, options: MountOptions, source: str) -> int:
    """Mount; return the descriptor of the connection, which belongs to pyfuse3.

    After an error nothing is mounted.

    Raises:
        PrivilegeError: The user may not.
        MountpointError: The kernel does not take the mountpoint.
        FuseError: Anything else.
    """
    before = fuse_descriptors()
    failure = None
    with ExitStack() as undo:
        with _captured_stderr() as chatter:
            try:
                pyfuse3.init(operations, mountpoint, kernel_options(options, source))
                undo.callback(pyfuse3.close)  # unmounts
            except RuntimeError as error:
                failure = error
            said = chatter()
        if failure is not None:
            raise _explain(mountpoint, said or str(failure)) from failure
        if said:
            with suppress(OSError):  # nobody listens
                sys.stderr.write(f"qedfuse: {printable(said)}\n")
        new = fuse_descriptors() - before
        if len(new) != 1:
            msg = f"{printable(mountpoint)}: found {len(new)} connections, expected a new one"
            raise FuseError(msg)
        undo.pop_all()
        return new.pop()


def _explain(mountpoint: str, said: str) -> QedError:
    """Choose the class of error by what libfuse or fusermount3 said."""
    kind: type[QedError] = FuseError
    reason = said.replace(mountpoint, "")  # a name may have any word in it
    if "ermission denied" in reason or "not permitted" in reason or "only allowed if" in reason:
        kind = PrivilegeError
    elif "ountpoint" in reason or "ransport endpoint" in reason:
        kind = MountpointError
    return kind(f"{printable(mountpoint)}: cannot mount: {printable(said)}")


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Collect what C code and its children print on descriptor 2, as one line."""
    sys.stderr.flush()
    kept = os.dup(_STDERR)
    # In memory: there may be no place for temporary files.
    with open(os.memfd_create("qedfuse-stderr"), "rb") as file:  # noqa: PTH123  a descriptor
        os.dup2(file.fileno(), _STDERR)

        def chatter() -> str:
            text = os.pread(file.fileno(), _MAX_CHATTER, 0).decode(errors="backslashreplace")
            return "; ".join(line.strip() for line in text.split("\n") if line.strip())

        try:
            yield chatter
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
