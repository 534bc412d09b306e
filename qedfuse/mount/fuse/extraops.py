"""The C extension that brings us fallocate(2) and lseek(2), which pyfuse3 lacks.

It has to be in the process before pyfuse3 is, because it stands between pyfuse3 and
libfuse (see `_extraops.c`); that is why the package `qedfuse.mount` imports this module
first.  It is optional: where it could not be built, or cannot be loaded, the mount works
without those two requests.
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

    Handler = Callable[[Request, str, int, int, int, int, int], None]
    """Gets the request, its name, the user, the inode, the mode or whence, start, length."""


def _load() -> tuple[ModuleType | None, str]:
    """Load the extension so that its symbols are found before libfuse's."""
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


_extension, _why_not = _load()


def serve(handler: Handler) -> str | None:
    """Send the requests of the session to ``handler``; say why, if that is not possible."""
    if _extension is None:
        return _why_not
    if not _extension.hooked():
        return "libfuse was reached by another way"
    _extension.set_handler(handler)
    return None


def end() -> None:
    """Let go of the session, before it is closed: what is not answered yet never will be."""
    if _extension is not None:
        _extension.set_handler(None)
        _extension.end()
