"""Completion for fish: one ``complete`` for each option and operand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.pages.programs import mount_words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.cli.pages.model import Command, Option, Program, Value

_FRAME: Final = """\
function __PROGRAM_command -d 'The command on the line, if there is one yet'
    set -l words (commandline -opc)
    set -e words[1]
    for word in $words
        if contains -- $word COMMANDS
            echo $word
            return 0
        else if not string match -q -- '-*' $word
            return 1
        end
    end
    return 1
end

function __PROGRAM_is -a name -d 'Is that the command, and enough before the cursor?'
    test (__PROGRAM_command; or echo) = "$name"
end
"""

_WORDS: Final = """\
function __PROGRAM_mount_options -d 'Words between commas, behind what is there of them'
    set -l typed (commandline -ct)
    set -l before (string match -r '^.*,' -- $typed)
    for word in WORDS
        echo "$before$word"
    end
end
"""


def script(program: Program) -> str:
    """Write the completion of a program."""
    return "\n".join(_lines(program)).replace("PROGRAM", program.name) + "\n"


def _lines(program: Program) -> Iterator[str]:
    """Write its lines."""
    yield "# fish completion for PROGRAM"
    yield '# Made by "python -m qedfuse.cli.pages"; changes belong into what it reads.'
    yield ""
    named = [command for command in program.commands if command.name]
    yield _FRAME.replace("COMMANDS", " ".join(command.name for command in named))
    if program.commands[0].name:
        yield "complete -c PROGRAM -f"
        yield "complete -c PROGRAM -n 'not __PROGRAM_command' -s h -l help -d 'show help'"
        yield "complete -c PROGRAM -n 'not __PROGRAM_command' -s V -l version -d 'show the version'"
    else:
        yield _WORDS.replace("WORDS", " ".join(_mount_words()))
    condition = "not __PROGRAM_command" if program.commands[0].name else "__fish_is_first_token"
    for command in named:
        summary = _quoted(command.summary)
        yield f"complete -c PROGRAM -n '{condition}' -a {command.name} -d {summary}"
    for command in program.commands:
        yield from _command(command)


def _command(command: Command) -> Iterator[str]:
    """Write what may follow a command."""
    condition = (
        f"-n '__PROGRAM_is {command.name}'" if command.name else "-n 'not __PROGRAM_command'"
    )
    head = f"complete -c PROGRAM {condition}"
    yield ""
    for option in command.options:
        yield f"{head}{_option(option)}"
    if not any("--help" in option.flags for option in command.options):
        yield f"{head} -s h -l help -d 'show help'"
    words = [word for operand in command.operands for word in operand.value.words]
    if words:
        yield f"{head} -a {_quoted(' '.join(words))}"
    if any(operand.value.kind == "file" for operand in command.operands):
        yield f"{head} -F"


def _option(option: Option) -> str:
    """Write the part about an option."""
    text = ""
    for flag in option.flags:
        text += f" -l {flag[2:]}" if flag.startswith("--") else f" -s {flag[1:]}"
    if option.value is not None:
        text += _value(option.value)
    return f"{text} -d {_quoted(option.help)}"


def _value(value: Value) -> str:
    """Write how a value is completed."""
    if value.words:
        return f" -x -a {_quoted(' '.join(value.words))}"
    ways = {
        "file": " -r -F",
        "directory": " -x -a '(__fish_complete_directories)'",
        "mount-options": " -x -a '(__PROGRAM_mount_options)'",
    }
    return ways.get(value.kind, " -x")


def _mount_words() -> Iterator[str]:
    """List the words for ``-o``, each with each of its values."""
    for word, choices in mount_words().items():
        if choices is None:
            yield word
        else:
            yield from (f"{word}={choice}" for choice in choices or ("",))


def _quoted(text: str) -> str:
    """Quote for the shell."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
