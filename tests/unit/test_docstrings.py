"""Docstrings, comments and pages name only classes, members and arguments that exist."""

from __future__ import annotations

import ast
import builtins
import re
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]

QEMU_NAMES: Final = {"qed_check_table_offset", "qed_check_cluster_offset"}
"""Names of QEMU's code that docstrings cite."""

PROSE: Final = re.compile(r'""".*?"""|#[^\n]*', re.DOTALL)
"""Docstrings and comments."""

SOURCES: Final = {path: path.read_text("utf-8") for path in (ROOT / "qedfuse").rglob("*.py")}


@cache
def syntax_nodes() -> dict[Path, list[ast.AST]]:
    """Return the nodes of each source; not made on import, which each test process does."""
    return {path: list(ast.walk(ast.parse(text))) for path, text in SOURCES.items()}


def code_names() -> set[str]:
    """Return the identifiers of all code, and the names of all modules."""
    files = {path.stem for path in (ROOT / "qedfuse").rglob("*.[pc]*")}
    names = files | {"c"} | set(dir(builtins)) | QEMU_NAMES
    for text in SOURCES.values():
        names.update(re.findall(r"\w+", PROSE.sub("", text)))
    return names


@cache
def class_members() -> dict[str, set[str]]:
    """Return the members of each class by its name, including those of its base classes."""
    own: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for node in (node for nodes in syntax_nodes().values() for node in nodes):
        if isinstance(node, ast.ClassDef):
            found = own.setdefault(node.name, set())
            names = {ast.unparse(base).partition("[")[0].split(".")[-1] for base in node.bases}
            bases.setdefault(node.name, set()).update(names)
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.add(inner.name)
                elif isinstance(inner, ast.Attribute) and ast.unparse(inner.value) == "self":
                    found.add(inner.attr)
            for target in ast.walk(ast.Module(node.body, [])):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    found.add(target.id)

    for _ in range(5):  # more than the depth of the deepest class
        for name, found in own.items():
            found.update(*(own.get(base, set()) for base in bases[name]))
    return own


def test_references_in_docstrings_exist() -> None:
    """Each name in single backticks is one of the code, so no reference outlives a renaming."""
    names, classes = code_names(), class_members()
    missing, count = [], 0
    for path, text in SOURCES.items():
        for reference in re.findall(r"(?<!`)`([^`\s]{2,})`(?!`)", "\n".join(PROSE.findall(text))):
            count += 1
            owner, _, member = reference.rpartition(".")
            if set(re.findall(r"\w+", reference)) - names or member not in classes.get(
                owner, {member}
            ):
                missing.append(f"{path.relative_to(ROOT)}: {reference}")
    assert missing == []
    assert count > 1000, "references were not found"


def test_members_that_pages_name_exist() -> None:
    """Where a page names a member of a class, the class has this member."""
    classes = class_members()
    named = [
        (page.name, owner, member)
        for page in (ROOT / "docs").glob("*.md")
        for owner, member in re.findall(r"`([A-Z]\w+)\.(\w+)", page.read_text("utf-8"))
        if owner in classes
    ]
    assert [item for item in named if item[2] not in classes[item[1]]] == []
    assert len(named) > 30, "members were not found"


def test_documented_arguments_exist() -> None:
    """A section on arguments has only arguments of the function, in their order."""
    wrong, count = [], 0
    for path, nodes in syntax_nodes().items():
        for node in nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            docstring = ast.get_docstring(node) or ""
            _, _, section = f"{docstring}\n\n".partition("\nArgs:\n")
            listed = re.findall(r"^    \**(\w+):", re.split(r"\n(?=\S)", section)[0], re.MULTILINE)
            given = node.args
            every = (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg)
            known = [item.arg for item in every if item is not None and item.arg in listed]
            count += len(listed)
            if listed != known:
                wrong.append(f"{path.relative_to(ROOT)}: {node.name}: {listed}")
    assert wrong == []
    assert count > 1000, "arguments were not found"
