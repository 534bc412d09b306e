"""Imports point downwards only, so that each layer can be understood without those above."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import qedfuse

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(qedfuse.__file__).parent

MAY_IMPORT: Final = {
    "util": {"errors"},
    "errors": {"util"},
    "ondisk": set[str](),
    "hostio": {"ondisk"},
    "disk": {"hostio", "ondisk"},
    "check": {"disk", "hostio", "ondisk"},
    "tools": {"check", "disk", "hostio", "ondisk"},
    "mount": {"check", "disk", "hostio", "ondisk"},
    "api": {"check", "disk", "hostio", "ondisk"},
    "cli": {"mount", "tools", "check", "disk", "hostio", "ondisk"},
    "__main__": {"cli"},
}
"""For each layer those that it may use, besides itself, ``errors`` and ``util``."""

FOR_ALL: Final = {"errors", "util"}

PURE: Final = {"trio", "pyfuse3", "os", "io", "asyncio", "threading", "subprocess"}
"""What turning bytes into values has no use for."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(module: Path) -> str:
    """Give the layer that a module belongs to; the package itself is ``qedfuse``."""
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    return "qedfuse" if parts == ("__init__",) else parts[0]


def imported(module: Path) -> Iterator[str]:
    """List what a module imports, also inside functions and for type checkers."""
    for node in ast.walk(ast.parse(module.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def used_layers(module: Path) -> set[str]:
    """Give the layers that a module uses; a bare ``qedfuse`` is none."""
    names = (name.split(".") for name in imported(module))
    return {name[1] for name in names if name[0] == "qedfuse" and len(name) > 1} - {"__version__"}


@pytest.mark.parametrize(
    "module",
    [module for module in MODULES if layer_of(module) != "qedfuse"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_imports_point_downwards(module: Path) -> None:
    """A module uses its own layer and those below it; only the package hands out names of all."""
    layer = layer_of(module)
    assert used_layers(module) - {layer} - FOR_ALL - MAY_IMPORT[layer] == set()


def test_every_layer_is_known() -> None:
    """A new part of the package is given its place here first."""
    assert {layer_of(module) for module in MODULES} == {*MAY_IMPORT, "qedfuse"}


def test_ondisk_is_pure() -> None:
    """The format is bytes to values: no I/O, no event loop."""
    for module in (PACKAGE / "ondisk").glob("*.py"):
        assert not {name.split(".")[0] for name in imported(module)} & PURE, module


def test_only_the_mount_knows_the_kernel() -> None:
    """Nothing below the mount needs pyfuse3, so tools and programs work without FUSE."""
    for module in MODULES:
        if "pyfuse3" in {name.split(".")[0] for name in imported(module)}:
            assert layer_of(module) == "mount", module
