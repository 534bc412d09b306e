"""The inputs of each target that are kept: one file of text, one input on each line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_DIRECTORY: Final = Path(__file__).with_name("corpus")


def load(name: str) -> list[bytes]:
    """Return the inputs that are kept for a target."""
    path = _DIRECTORY / f"{name}.txt"
    if not path.exists():
        return []
    lines = path.read_text(encoding="ascii").splitlines()
    return [bytes.fromhex(line) for line in lines if not line.startswith("#")]


def save(name: str, inputs: Iterable[bytes]) -> None:
    """Replace the inputs that are kept for a target."""
    lines = sorted((data.hex() for data in set(inputs)), key=lambda text: (len(text), text))
    text = "".join(f"{line}\n" for line in lines)
    (_DIRECTORY / f"{name}.txt").write_text(text, encoding="ascii")
