"""A model of a program's command line, independent of man pages and shells."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind: TypeAlias = Literal["file", "directory", "words", "mount-options", "free"]
"""What a shell offers for a value.

"file" and "directory": names of files and of directories; "words": the fixed values;
"mount-options": the options of ``qedfuse -o``; "free": nothing.
"""

_FILES: Final = frozenset(
    {"IMAGE", "BASE", "FILE", "SOURCE", "TARGET", "FIRST", "SECOND", "MOUNTPOINT"}
)
"""Names of values in the help that are completed as files."""
_DIRECTORIES: Final = frozenset({"DIR"})
"""Names of values in the help that are completed as directories."""


@dataclass(frozen=True, slots=True)
class Value:
    """The value of an option or an operand.

    Attributes:
        name: The name of the value in the help, such as ``SIZE``.
        kind: How a shell completes the value.
        words: All possible values if they are fixed; otherwise empty.
    """

    name: str
    kind: Kind = "free"
    words: tuple[str, ...] = ()

    @classmethod
    def named(cls, name: str, words: tuple[str, ...] = ()) -> Value:
        """Return a value whose kind follows from ``words`` and ``name``."""
        if words:
            return cls(name, "words", words)
        plain = name.strip("[].")
        kinds: tuple[tuple[frozenset[str], Kind], ...] = (
            (_FILES, "file"),
            (_DIRECTORIES, "directory"),
        )
        return cls(name, next((kind for names, kind in kinds if plain in names), "free"))


@dataclass(frozen=True, slots=True)
class Option:
    """An option.

    Attributes:
        flags: The names of the option, short before long.
        help: What the option does.
        value: The value of the option; None if the option has no value.
        repeats: Whether the option can be repeated.
    """

    flags: tuple[str, ...]
    help: str
    value: Value | None = None
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class Operand:
    """A word of the command line that is not an option.

    Attributes:
        value: The name and the kind of the operand.
        optional: Whether the operand can be omitted.
        repeats: Whether the operand can be given several times.
        help: What the operand is; empty if its name says so.
    """

    value: Value
    optional: bool = False
    repeats: bool = False
    help: str = ""

    def __str__(self) -> str:
        """Return the operand as it stands in a synopsis, such as ``[SIZE]`` or ``SOURCE...``."""
        words = "|".join(self.value.words) or self.value.name
        text = words + ("..." if self.repeats else "")
        return f"[{text}]" if self.optional else text


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand, or what a program does without a subcommand.

    Attributes:
        name: The word that selects the subcommand; empty without a subcommand.
        summary: The purpose, in a line.
        options: The options.
        operands: The operands, in order.
        description: Paragraphs with empty lines between them; empty for a command of qedfuse.
        example: A command line; empty for a command of qedfuse.
        exit_codes: The meaning of each exit code; empty if the program's own list applies.
    """

    name: str
    summary: str
    options: tuple[Option, ...]
    operands: tuple[Operand, ...]
    description: str = ""
    example: str = ""
    exit_codes: Mapping[int, str] = field(default_factory=dict)

    def completions(self) -> list[tuple[Operand, Value]]:
        """Return the operands, each with the `Value` by which a shell completes it.

        An optional operand of the kind "free" is completed like the next operand, because the user
        may omit the optional one.  Operands after one that repeats are left out.
        """
        found = []
        for index, operand in enumerate(self.operands):
            value = operand.value
            if operand.optional and value.kind == "free" and self.operands[index + 1 :]:
                value = self.operands[index + 1].value
            found.append((operand, value))
            if operand.repeats:
                break
        return found


@dataclass(frozen=True, slots=True)
class Program:
    """A program and its commands; only the first command can have an empty name."""

    name: str
    commands: tuple[Command, ...]


def options_of(parser: argparse.ArgumentParser) -> tuple[Option, ...]:
    """Return the options of a parser in the order of its help."""
    return tuple(
        Option(
            flags=tuple(sorted(action.option_strings, key=len)),
            help=_help(action),
            value=None if action.nargs == 0 else _value(action),
            repeats=isinstance(action, argparse._AppendAction),  # noqa: SLF001  it has no public name
        )
        for action in _actions(parser)
        if action.option_strings
    )


def operands_of(parser: argparse.ArgumentParser) -> tuple[Operand, ...]:
    """Return the operands of a parser in order."""
    return tuple(
        Operand(
            value=_value(action),
            optional=action.nargs in ("?", "*"),
            repeats=action.nargs in ("+", "*"),
            help=_help(action),
        )
        for action in _actions(parser)
        if not action.option_strings
    )


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return those options and operands of a parser that its help shows."""
    shown = parser._actions  # noqa: SLF001  argparse has no public access to them
    return [action for action in shown if action.help != argparse.SUPPRESS]


def _value(action: argparse.Action) -> Value:
    """Return the value of an option or operand: its name in the help, and its fixed values."""
    words = tuple(map(str, action.choices or ()))
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return Value.named(name, words)


def _help(action: argparse.Action) -> str:
    """Return the help of an option or operand in its printed form: ``%%`` becomes ``%``."""
    return (action.help or "").replace("%%", "%")
