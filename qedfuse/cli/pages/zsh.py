"""Completion for zsh: specifications for its ``_arguments``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.cli.pages.programs import mount_words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.cli.pages.model import Command, Option, Program, Value


def script(program: Program) -> str:
    """Write the completion of a program."""
    return "\n".join(_lines(program)) + "\n"


def _lines(program: Program) -> Iterator[str]:
    """Write its lines."""
    name = program.name
    named = [command for command in program.commands if command.name]
    plain = next((command for command in program.commands if not command.name), None)
    yield f"#compdef {name}"
    yield '# Made by "python -m qedfuse.cli.pages"; changes belong into what it reads.'
    yield ""
    yield from _mount_options(name) if plain else ()
    yield from (f"_{name}_commands() {{", "    local -a commands=(")
    yield from (f"        {_quoted(f'{item.name}:{item.summary}')}" for item in named)
    yield from ("    )", f"    _describe -t commands '{name} command' commands", "}", "")
    yield from (f"_{name}() {{", "    local curcontext=$curcontext state line ret=1")
    if plain is None:
        yield "    _arguments -C \\"
        yield "        '(- *)'{-h,--help}'[show help]' '(- *)'{-V,--version}'[show the version]' \\"
        yield f"        '1:command:_{name}_commands' '*::argument:->arguments' && return"
        yield from ("    [[ $state == arguments ]] || return", "    case $words[1] in")
    else:
        yield "    case $words[2] in"
    for command in named:
        yield f"        {command.name})"
        if plain is not None:
            yield "            shift words; (( CURRENT-- ))"
        yield from (*_arguments(name, command), "            ;;")
    if plain is not None:
        yield from ("        *)", *_arguments(name, plain), "            ;;")
    yield from ("    esac", "    return ret", "}", "", f'_{name} "$@"')


def _arguments(program: str, command: Command) -> Iterator[str]:
    """Write the call that completes the words of a command."""
    specs = [_option(option, program) for option in command.options]
    if not any("--help" in option.flags for option in command.options):
        specs.append("'(- *)'{-h,--help}'[show help]'")
    if not command.name:
        # The first word may be a command instead.
        choice = f"_alternative 'names:image:_files' 'commands:command:_{program}_commands'"
        specs.append(_quoted(f"1:image:{{{choice}}}"))
    specs += map(_quoted, _operands(command))
    yield "            _arguments -s -S \\"
    for spec in specs[:-1]:
        yield f"                {spec} \\"
    yield f"                {specs[-1]} && ret=0"


def _operands(command: Command) -> Iterator[str]:
    """Write the specifications of a command's words."""
    for number, (operand, value) in enumerate(command.places(), 1):
        place = "*" if operand.repeats else f"{number}:" if operand.optional else f"{number}"
        yield f"{place}:{_plain(operand.value.name)}:{_action(value)}"


def _option(option: Option, program: str) -> str:
    """Write the specification of an option."""
    value = ""
    if option.value is not None:
        action = _action(option.value).replace("_mount_options", f"_{program}_mount_options")
        value = f":{_plain(option.value.name)}:{action}"
    text = f"[{_escaped(option.help)}]{value}"
    # The value may be a word of its own, or follow at once.
    ends = ("=" if flag.startswith("--") else "+" for flag in option.flags)
    flags = [flag + (end if value else "") for flag, end in zip(option.flags, ends, strict=True)]
    if len(flags) == 1:
        return _quoted(("*" if option.repeats else "") + flags[0] + text)
    before = "'*'" if option.repeats else _quoted(f"({' '.join(option.flags)})")
    return f"{before}{{{','.join(flags)}}}{_quoted(text)}"


def _action(value: Value) -> str:
    """Write how a value is completed."""
    if value.words:
        return f"({' '.join(value.words)})"
    actions = {"file": "_files", "directory": "_files -/", "mount-options": "_mount_options"}
    return actions.get(value.kind, " ")


def _mount_options(program: str) -> Iterator[str]:
    """Write the function for words between commas."""
    yield f"_{program}_mount_options() {{"
    yield "    _values -s , option \\"
    words = list(mount_words().items())
    for number, (word, choices) in enumerate(words, 1):
        if choices is None:
            spec = word
        elif choices:
            spec = f"{word}:value:({' '.join(choices)})"
        else:
            names = {"overlay": "_files", "backing_dir": "_files -/"}
            spec = f"{word}:value:{names.get(word, ' ')}"
        yield f"        {_quoted(spec)}" + ("" if number == len(words) else " \\")
    yield from ("}", "")


def _plain(name: str) -> str:
    """Take out of a name what a specification would act on."""
    return "".join(char for char in name if char.isalnum() or char in " _-+").lower()


def _escaped(text: str) -> str:
    """Protect what a specification would act on."""
    return "".join(f"\\{char}" if char in "[]:\\" else char for char in text)


def _quoted(text: str) -> str:
    """Quote for the shell."""
    return "'" + text.replace("'", r"'\''") + "'"
