"""Removing barriers from the code under test, to show that a test notices their absence.

A *sabotage* replaces functions of the code under test, and counts how often it *strikes*: how
often it leaves a barrier out of a run.  Where a sabotage names a function that does not exist,
it cannot be applied.  A test that applies one checks afterwards that it struck, and that every
function which it replaced was called.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, TypeAlias

from qedfuse.disk.writeback.metadata import MetadataWriteback

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import FrameType

    import pytest


class Saboteur:
    """Replaces functions of the code under test.

    Attributes:
        strikes: How often a replaced function left something out or did it too early.
        uncalled: Names of the replaced functions that have not been called.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        """Replace nothing yet; ``patch`` restores the functions later."""
        self._patch = patch
        self.strikes = 0
        self.uncalled: set[str] = set()

    def replace(self, owner: type, name: str, replacement: Callable[..., object]) -> None:
        """Replace the function ``name`` that the class ``owner`` itself defines."""
        function = f"{owner.__name__}.{name}"
        assert name in vars(owner), f"found no {function} to replace"
        self.uncalled.add(function)

        def called(*args: object, **kwargs: object) -> object:
            self.uncalled.discard(function)
            return replacement(*args, **kwargs)

        self._patch.setattr(owner, name, called)

    def strike(self) -> None:
        """Count one barrier left out."""
        self.strikes += 1


Sabotage: TypeAlias = "Callable[[Saboteur], None]"


def without_barrier(
    caller: Callable[..., Awaitable[object]], nth: int = 1, of: int = 1
) -> Sabotage:
    """Leave out the ``nth`` of the ``of`` barriers that each call of ``caller`` waits for."""
    code = inspect.unwrap(caller).__code__

    def sabotage(saboteur: Saboteur) -> None:
        barrier = MetadataWriteback.barrier
        call: FrameType | None = None
        seen = 0

        async def leaky(self: MetadataWriteback) -> None:
            nonlocal call, seen
            frame = sys._getframe(1)
            if frame.f_code is code:
                seen = seen + 1 if frame is call else 1
                call = frame
                assert seen <= of, f"{code.co_qualname} waits for more than {of} barriers"
                if seen == nth:
                    saboteur.strike()
                    self.note_write()
                    return
            await barrier(self)

        saboteur.replace(MetadataWriteback, "barrier", leaky)

    return sabotage
