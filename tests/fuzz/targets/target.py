"""The form of a target of the fuzzer, and an assertion that all targets make of errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_MESSAGE_CHARS: Final = 20_000
"""Maximum length of a message: a name of 4096 bytes, each escaped as four characters, and text."""


@dataclass(frozen=True)
class Target:
    """A part of the program that reads untrusted bytes.

    Attributes:
        check: Passes one input to the part, and asserts what must hold for every input.  Every
            exception that it raises is a finding.
        seeds: Returns valid inputs, from which others are mutated.
        tokens: Bytes that are inserted into inputs: words, magic numbers.
        max_bytes: Maximum length of an input.
        ask_peer: Compares what the part and QEMU make of an input; returns whether QEMU was
            asked.  None if QEMU has no such part.
        uses_c: Whether the part has C code of this project.
    """

    check: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    tokens: tuple[bytes, ...] = ()
    max_bytes: int = 2048
    ask_peer: Callable[[bytes], bool] | None = None
    uses_c: bool = False


def assert_line(error: BaseException) -> None:
    """Assert that the message of an error is one line that can be printed unchanged."""
    text = str(error)
    assert text, f"{type(error).__name__} without a message"
    assert text.isprintable(), f"message {text!r}"
    assert len(text) <= _MAX_MESSAGE_CHARS, f"a message of {len(text)} characters"
