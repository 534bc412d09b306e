"""Choosing the inputs that are worth keeping: each reaches a line of qedfuse that no other does.

Lines are traced with `sys.settrace`, which is slow, so this is done only to change the corpus.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import qedfuse
from tests.fuzz.inputs import check_input, limits

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

    from tests.fuzz.targets.target import Target

    Line = tuple[str, int, int]
    """A file, a line, and the line before it in the same call."""

MAX_INPUTS: Final = 60
"""Maximum number of inputs that are kept for a target."""
MAX_INPUT_BYTES: Final = 400
_SOURCE: Final = str(Path(qedfuse.__file__).parent)


def reduced(target: Target, kept: Iterable[bytes], inputs: Iterable[bytes]) -> list[bytes]:
    """Return the inputs that are kept, and of other inputs those that reach further lines.

    Args:
        target: The target.
        kept: Inputs that stay in the result: some were findings, whose lines others reach too.
        inputs: Inputs that are added, the shortest first, up to the limits of this module.
    """
    reached: set[Line] = set()
    result = list(kept)
    with limits():
        for data in (*target.seeds(), *result):
            _trace(target, data, reached)
        for data in sorted(set(inputs) - set(result), key=lambda item: (len(item), item)):
            before = len(reached)
            _trace(target, data, reached)
            is_short = len(data) <= MAX_INPUT_BYTES and len(result) < MAX_INPUTS
            if is_short and len(reached) > before:
                result.append(data)
    return result


def _trace(target: Target, data: bytes, reached: set[Line]) -> None:
    """Add the lines that an input reaches to ``reached``."""
    last: dict[int, int] = {}

    def on_line(frame: FrameType, event: str, _value: object) -> Any:  # noqa: ANN401  settrace
        if event == "line":
            key = id(frame)
            reached.add((frame.f_code.co_filename, last.get(key, 0), frame.f_lineno))
            last[key] = frame.f_lineno
        return on_line

    def on_call(frame: FrameType, _event: str, _value: object) -> Any:  # noqa: ANN401  the same
        last.pop(id(frame), None)
        return on_line if frame.f_code.co_filename.startswith(_SOURCE) else None

    sys.settrace(on_call)
    try:
        check_input(target, data)
    finally:
        sys.settrace(None)
