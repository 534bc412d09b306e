"""Loading of the C extension that adds fallocate(2) and lseek(2), which pyfuse3 lacks.

The extension interposes a function between pyfuse3 and libfuse (see `_extraops.c`), so the
extension must be loaded before pyfuse3.  Therefore the package `qedfuse.mount` imports this
module first.  If the extension was not built or cannot be loaded, the mount works without these
two requests.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from qedfuse.mount.fuse._extraops import Request
    from qedfuse.mount.fuse.fastrequests import FastRequests

    Handler = Callable[[Request, str, int, int, int, int, int], None]
    """Called with the request, its name (``fallocate`` or ``lseek``), the user, the inode, the
    mode of fallocate or the whence of lseek, the start of the range in bytes, and the length of
    the range in bytes (without meaning for lseek)."""


def _load() -> tuple[ModuleType | None, str]:
    """Load the extension so that its symbols precede those of libfuse (RTLD_GLOBAL).

    Returns:
        The extension and an empty string, or None and the reason why it is not loaded.
    """
    if "pyfuse3" in sys.modules:
        return None, "pyfuse3 was loaded first"
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        return importlib.import_module("qedfuse.mount.fuse._extraops"), ""
    except ModuleNotFoundError:
        return None, "the extension was not built when qedfuse was installed"
    except ImportError as error:
        return None, str(error)
    finally:
        sys.setdlopenflags(flags)


_extension, _load_error = _load()


def serve(handler: Handler, fast: FastRequests | None) -> str | None:
    """Pass requests of the session to ``handler`` and ``fast`` from now on.

    ``handler`` gets fallocate and lseek.  ``fast`` gets read, write and fsync first, and pyfuse3
    gets those that ``fast`` does not answer; None if pyfuse3 must get all.

    Returns:
        None if the requests are passed.  Otherwise one line with the reason why the kernel gets
        no answer from ``handler``.
    """
    if _extension is None:
        return _load_error
    if not _extension.hooked():
        return "pyfuse3 has called libfuse without the extension"
    _extension.set_handler(handler)
    if fast is not None:
        _extension.set_data_handlers(fast.read, fast.write, fast.fsync)
    return None


def end() -> None:
    """Detach from the session; requests that were not answered get no answer any more.

    The caller must call this before it closes the session, because closing it frees the requests.
    Without the extension nothing is done.
    """
    if _extension is not None:
        _extension.set_handler(None)
        _extension.set_data_handlers(None, None, None)
        _extension.end()
