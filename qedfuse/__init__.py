"""QED disk images as flat raw files.

    with qedfuse.open("vm.qed", "r+b") as disk:  # a plain binary file object
        disk.write(b"...")

    async with qedfuse.open_disk("vm.qed") as disk:  # the same for programs that use trio
        await disk.read(0, 512)

Each public name is imported at its first use.
"""

from __future__ import annotations

# Type checkers treat a variable of this name as true.  An import of typing would take long, and
# Ctrl-C during the import would print a traceback.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from qedfuse.api import DiskFile, open  # noqa: A004  a module's open, like gzip.open
    from qedfuse.disk.creation.create import create_image
    from qedfuse.disk.disk import Disk
    from qedfuse.disk.opening import open_disk
    from qedfuse.disk.options import BackingPolicy, OpenOptions
    from qedfuse.errors import QedError

__version__ = "0.1.0"

__all__ = [
    "BackingPolicy",
    "Disk",
    "DiskFile",
    "OpenOptions",
    "QedError",
    "create_image",
    "open",
    "open_disk",
]

_MODULES = {
    "BackingPolicy": "disk.options",
    "Disk": "disk.disk",
    "DiskFile": "api",
    "OpenOptions": "disk.options",
    "QedError": "errors",
    "create_image": "disk.creation.create",
    "open": "api",
    "open_disk": "disk.opening",
}

# Type checkers accept every attribute of a module that defines __getattr__.  So the function is
# hidden from them.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import and return a public name, at its first use."""
        module = _MODULES.get(name)
        if module is None:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        from importlib import import_module  # noqa: PLC0415  imported late: import qedfuse must not load it

        value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
        return value


def __dir__() -> list[str]:
    """Return all names of the package, including public names that are not imported yet."""
    return sorted({*globals(), *__all__})
