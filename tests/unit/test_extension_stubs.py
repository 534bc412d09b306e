"""The type stubs of the C extensions name the functions and methods that the extensions have."""

from __future__ import annotations

import ast
import importlib
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.mount.fuse import extraops
from tests.support.extensions import MODULES, needs_extensions
from tests.support.sandbox import ROOT

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

STUBS: Final = sorted((ROOT / "qedfuse").rglob("*.pyi"))


def loaded(name: str) -> ModuleType:
    """Return an extension; the one beside pyfuse3 is loaded by `qedfuse.mount.fuse.extraops`."""
    if name == "qedfuse.mount.fuse._extraops":
        assert extraops._extension is not None
        return extraops._extension
    return importlib.import_module(name)


def public_names(value: object) -> set[str]:
    """Return the names of a module or type, without those that begin with an underscore."""
    return {name for name in vars(value) if not name.startswith("_")}


def stated_names(nodes: list[ast.stmt]) -> set[str]:
    """Return the names in the body of a stub, or of a class in it."""
    found = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    found |= {
        node.target.id
        for node in nodes
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return {name for name in found if not name.startswith("_")}


def test_every_stub_belongs_to_an_extension() -> None:
    """There is no stub of a module that does not exist, and at least one stub is found."""
    names = {".".join(stub.relative_to(ROOT).with_suffix("").parts) for stub in STUBS}
    assert names
    assert names <= set(MODULES)


@needs_extensions
@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.stem)
def test_names_are_those_of_the_extension(stub: Path) -> None:
    """A stub has the constants, functions, types and methods of its extension, and no others.

    A type that only the extension makes may be absent from the extension's names.
    """
    module = loaded(".".join(stub.relative_to(ROOT).with_suffix("").parts))
    body = ast.parse(stub.read_text("utf-8")).body
    made_inside = set()
    for node in body:
        if isinstance(node, ast.ClassDef):
            kind = getattr(module, node.name, None)
            if kind is None:
                made_inside.add(node.name)
            else:
                assert stated_names(node.body) == public_names(kind), node.name
    assert stated_names(body) - made_inside == public_names(module)
