"""Imports point downwards only, between the floors of the package and within each of them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import qedfuse

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(qedfuse.__file__).parent
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"

MAY_IMPORT: Final = {
    "util": set[str](),
    "ondisk": set[str](),
    "partitions": set[str](),
    "hostio": {"ondisk"},
    "remote": {"hostio", "ondisk"},
    "nbd": {"remote", "hostio", "ondisk"},
    "foreign": {"nbd", "remote", "hostio", "ondisk"},
    "disk": {"foreign", "nbd", "remote", "hostio", "ondisk"},
    "check": {"disk", "hostio", "ondisk"},
    "tools": {"partitions", "check", "disk", "foreign", "nbd", "remote", "hostio", "ondisk"},
    "mount": {"partitions", "check", "disk", "nbd", "remote", "hostio", "ondisk"},
    "api": {"check", "disk", "nbd", "remote", "hostio", "ondisk"},
    "cli": {"partitions", "mount", "tools", "check", "disk", "nbd", "remote", "hostio", "ondisk"},
    "__main__": {"cli"},
}
"""For each layer the layers that it may use, besides itself and ``FOR_ALL``."""

FOR_ALL: Final = {"errors", "text", "util"}

PURE: Final = {"trio", "pyfuse3", "os", "io", "asyncio", "threading", "subprocess"}
"""Modules that code without I/O does not need."""


def drawn() -> list[str]:
    """Return the modules in the picture of docs/architecture.md, the lowest first."""
    picture = ARCHITECTURE.read_text("utf-8").partition("<!-- floors -->\n```text\n")[2]
    modules = []
    for line in reversed(picture.partition("```")[0].splitlines()):
        floor, _, names = line.partition(":")
        prefix = "" if floor.strip() == "qedfuse" else floor.strip() + "."
        modules += [prefix + name for name in reversed(names.split())]
    return modules


def name_of(path: Path) -> str:
    """Return the dotted name of a module below ``qedfuse``; a package has its own name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FLOORS: Final = drawn()
MODULES: Final = {
    name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if name_of(path) != "__init__"
}


def imported(path: Path) -> Iterator[str]:
    """List what a module imports, also inside functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def uses(path: Path) -> set[str]:
    """Return the modules of qedfuse that a module imports; packages only for their own names."""
    return {
        name.removeprefix("qedfuse.")
        for name in imported(path)
        if name.removeprefix("qedfuse.") in MODULES and not is_package(name)
    }


def is_package(name: str) -> bool:
    """Return whether a name is a package of qedfuse and no module."""
    return MODULES[name.removeprefix("qedfuse.")].name == "__init__.py"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_modules_below_it(name: str) -> None:
    """No arrow of the picture points upwards, type-only imports included; so no cycle exists."""
    if is_package(name):
        return
    allowed = set(FLOORS[: FLOORS.index(name)])
    assert uses(MODULES[name]) - allowed == set()


@pytest.mark.parametrize("name", MODULES)
def test_a_layer_uses_the_layers_below_it(name: str) -> None:
    """A layer imports only the layers below it."""
    layer = name.partition(".")[0]
    used = {other.partition(".")[0] for other in uses(MODULES[name])}
    assert used - {layer} - FOR_ALL - MAY_IMPORT.get(layer, set()) == set()


def test_the_picture_shows_every_module_once() -> None:
    """Every module is in the picture of docs/architecture.md exactly once."""
    assert sorted(FLOORS) == sorted(name for name in MODULES if not is_package(name))


def test_ondisk_is_pure() -> None:
    """Ondisk imports nothing that does I/O, and no event loop."""
    for path in (PACKAGE / "ondisk").glob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & PURE, path


def test_only_the_mount_imports_pyfuse3() -> None:
    """Only the mount imports pyfuse3."""
    for name, path in MODULES.items():
        if "pyfuse3" in {used.split(".")[0] for used in imported(path)}:
            assert name.startswith("mount."), name


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(("disk.", "mount."))])
def test_no_object_completes_another(name: str) -> None:
    """An object is complete when constructed: no method assigns ``self.collaborator.attribute``."""
    assigned = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(MODULES[name].read_bytes()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Attribute)
    }
    # A cancel scope of trio is configured this way; a write-back unpins the slice it came from;
    # the scheduler counts in its own statistics.
    allowed = {"self._scope.deadline", "self.source.pins"}
    counts = ("ready", "slept", "yields", "failed_polls")
    allowed |= {f"self.statistics.{name}" for name in counts}
    assert assigned - allowed == set()
