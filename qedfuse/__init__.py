"""QED disk images as flat raw files.

    with qedfuse.open("vm.qed", "r+b") as disk:  # a plain binary file object
        disk.write(b"...")

    async with qedfuse.open_disk("vm.qed") as disk:  # the same for programs that run on trio
        await disk.read(0, 512)

The names are imported when they are first used, so that ``import qedfuse`` costs nothing.
"""

from __future__ import annotations

# Said as type checkers understand it: the module typing is the largest that would be loaded
# here, and before the commands can see to it Ctrl-C shows a traceback.
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

_HOMES = {
    "BackingPolicy": "disk.options",
    "Disk": "disk.disk",
    "DiskFile": "api",
    "OpenOptions": "disk.options",
    "QedError": "errors",
    "create_image": "disk.creation.create",
    "open": "api",
    "open_disk": "disk.opening",
}

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        """Import a public name at its first use."""
        home = _HOMES.get(name)
        if home is None:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        from importlib import import_module  # noqa: PLC0415  a quick start

        value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
        return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})
