"""Importing the C extensions, which are optional, and comparing their interface numbers.

An extension that was built from another version of the sources can be called in a wrong way, and
then crash the process or make a mount hang.  So the C source of an extension and the module that
imports the extension have the same number.  A change must raise both numbers if the old extension
cannot work with the new callers, or the new extension with the old callers.  Such changes are:

- of functions and types of the extension: their names, arguments, results and errors
- of the order or the threads in which they may be called
- of memory that the extension shares with Python code or with another extension

An extension with another number is treated as one that was not built.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qedfuse.text import printable

if TYPE_CHECKING:
    from types import ModuleType


class InterfaceError(ImportError):
    """An extension was built from another version of the sources."""


def import_extension(name: str, interface: int) -> ModuleType:
    """Import the extension ``name``, whose constant ``INTERFACE`` must be ``interface``.

    Raises:
        ModuleNotFoundError: The extension was not built.
        InterfaceError: The extension has another number, or none.
        ImportError: The extension cannot be loaded.
    """
    module = importlib.import_module(name)
    found = getattr(module, "INTERFACE", "none")
    if found != interface:
        msg = (
            f"{printable(str(module.__file__))} is not used: found interface {found}, expected "
            f"{interface}: it was built from another version of the sources, install qedfuse again"
        )
        raise InterfaceError(msg)
    return module


def try_import_extension(name: str, interface: int) -> ModuleType | None:
    """Import an extension like `import_extension`; return None if it cannot be used.

    A warning is logged if the extension was built from another version of the sources.
    """
    try:
        return import_extension(name, interface)
    except InterfaceError as error:
        import logging  # noqa: PLC0415  imported late: slow, and needed for this warning only

        logging.getLogger(__name__).warning("%s", error)
    except ImportError:
        pass
    return None
