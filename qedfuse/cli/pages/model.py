"""What a program's command line takes, apart from how any page or shell writes it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind: TypeAlias = Literal["file", "directory", "words", "mount-options", "free"]
"""How a value is completed: by names of files, from a few words, or not at all."""

_FILES: Final = frozenset(
    {"IMAGE", "BASE", "FILE", "SOURCE", "TARGET", "FIRST", "SECOND", "MOUNTPOINT"}
)
_DIRECTORIES: Final = frozenset({"DIR"})


@dataclass(frozen=True, slots=True)
class Value:
    """A value that an option or an operand stands for.

    Attributes:
        name: How the help calls it, such as ``SIZE``.
        kind: How it is completed.
        words: What it can be, if that is a few words.
    """

    name: str
    kind: Kind = "free"
    words: tuple[str, ...] = ()

    @classmethod
    def named(cls, name: str, words: tuple[str, ...] = ()) -> Value:
        """Tell from its name what kind of value it is."""
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
        flags: What it is called, short before long.
        help: What it does.
        value: What follows it, if anything does.
        repeats: Whether it may be given again.
    """

    flags: tuple[str, ...]
    help: str
    value: Value | None = None
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class Operand:
    """A word that is no option.

    Attributes:
        value: What it stands for.
        optional: Whether it may be left out.
        repeats: Whether there may be several.
        help: What it is, if the name does not tell.
    """

    value: Value
    optional: bool = False
    repeats: bool = False
    help: str = ""

    def __str__(self) -> str:
        """Write it as a synopsis does."""
        words = "|".join(self.value.words) or self.value.name
        text = words + ("..." if self.repeats else "")
        return f"[{text}]" if self.optional else text


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand, or what a program does without one.

    Attributes:
        name: Its name; empty for what is done without one.
        summary: What it is for, in a line.
        options: Its options.
        operands: Its other words, in order.
        description: Paragraphs about it.
        example: A command that shows it.
        exit_codes: What its exit codes mean, where they are its own.
    """

    name: str
    summary: str
    options: tuple[Option, ...]
    operands: tuple[Operand, ...]
    description: str = ""
    example: str = ""
    exit_codes: Mapping[int, str] = field(default_factory=dict)

    def places(self) -> list[tuple[Operand, Value]]:
        """Tell for each word that is no option what may stand there.

        Where one that may be left out is nothing to complete, the next one may be there
        already.  Behind one that repeats there are only more of it.
        """
        found = []
        for number, operand in enumerate(self.operands):
            value = operand.value
            if operand.optional and value.kind == "free" and self.operands[number + 1 :]:
                value = self.operands[number + 1].value
            found.append((operand, value))
            if operand.repeats:
                break
        return found


@dataclass(frozen=True, slots=True)
class Program:
    """A program: its subcommands, among them the one without a name if there is one."""

    name: str
    commands: tuple[Command, ...]


def options_of(parser: argparse.ArgumentParser) -> tuple[Option, ...]:
    """List a parser's options in the order of its help."""
    return tuple(
        Option(
            flags=tuple(sorted(action.option_strings, key=len)),
            help=_help(action),
            value=None if action.nargs == 0 else _value(action),
            repeats=isinstance(action, argparse._AppendAction),  # noqa: SLF001  the only name
        )
        for action in _actions(parser)
        if action.option_strings
    )


def operands_of(parser: argparse.ArgumentParser) -> tuple[Operand, ...]:
    """List what a parser takes besides options."""
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
    """List what was added to a parser; argparse tells it nowhere else."""
    shown = parser._actions  # noqa: SLF001
    return [action for action in shown if action.help != argparse.SUPPRESS]


def _value(action: argparse.Action) -> Value:
    """Describe what an action takes."""
    words = tuple(map(str, action.choices or ()))
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return Value.named(name, words)


def _help(action: argparse.Action) -> str:
    """Give an action's help; argparse writes a per cent sign twice."""
    return (action.help or "").replace("%%", "%")
