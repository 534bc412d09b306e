"""The names of the targets; a target's module is imported when the target is used."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from tests.fuzz.targets.target import Target

_HELPERS: Final = frozenset(
    {"__init__", "drawn", "jsontokens", "patches", "registry", "scratch", "target"}
)
NAMES: Final = tuple(
    sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _HELPERS)
)
"""The names of all targets: each module beside this one, except the helpers, has one."""


def target_named(name: str) -> Target:
    """Return a target by its name."""
    return cast("Target", importlib.import_module(f"tests.fuzz.targets.{name}").TARGET)
