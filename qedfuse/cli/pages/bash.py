"""Completion for bash: tables of what may follow what, and one function that asks them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qedfuse.cli.pages.programs import mount_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qedfuse.cli.pages.model import Command, Program, Value

_HEAD: Final = """\
# bash completion for PROGRAM
# Made by "python -m qedfuse.cli.pages"; changes belong into what it reads.
# shellcheck shell=bash
"""

_FRAME: Final = r"""
_PROGRAM_offer() {
    # $1: what is typed; $2: whole words.  readline takes a part for done: it is cut off.
    local done=''
    [[ $1 == *[=:]* ]] && done=${1%"${1##*[=:]}"}
    mapfile -t COMPREPLY < <(compgen -W "$2" -- "$1")
    COMPREPLY=("${COMPREPLY[@]#"$done"}")
}

_PROGRAM_names() {
    # $1: -f for files, -d for directories; $2: the name so far.
    # Names that are quoted so far are left to readline.
    compopt -o filenames -o default 2>/dev/null
    mapfile -t COMPREPLY < <(compgen "$1" -- "$2")
}

_PROGRAM_mount_options() {
    # $1: words between commas, of which the last or its value is to be completed.
    local last=${1##*,} word words=''
    local before=${1%"$last"}
    if [[ $last != *=* ]]; then
        compopt -o nospace 2>/dev/null
        _PROGRAM_mount_words
        for word in $values; do words+=" $before$word"; done
        _PROGRAM_offer "$1" "$words"
        return
    fi
    _PROGRAM_word_value "${last%%=*}"
    case $values in
        -f | -d) _PROGRAM_names "$values" "${last#*=}" ;;
        *)
            for word in $values; do words+=" $before${last%%=*}=$word"; done
            _PROGRAM_offer "$1" "$words"
            ;;
    esac
}

_PROGRAM_value() {
    # $1: what may come, as the tables have it; $2: what is typed of it.
    case $1 in
        '') ;;
        -f | -d) _PROGRAM_names "$1" "$2" ;;
        -f\ *)
            _PROGRAM_names -f "$2"
            local names=("${COMPREPLY[@]}")
            _PROGRAM_offer "$2" "${1#-f }"
            COMPREPLY+=("${names[@]}")
            ;;
        mount-options) _PROGRAM_mount_options "$2" ;;
        *) _PROGRAM_offer "$2" "$1" ;;
    esac
}

_PROGRAM_option_and_value() {
    # $1: the command; $2: an option with "=" and a value.
    local word words=''
    _PROGRAM_option "$1" "${2%%=*}" || return
    case $values in
        -f | -d) _PROGRAM_names "$values" "${2#*=}" ;;
        *)
            for word in $values; do words+=" ${2%%=*}=$word"; done
            _PROGRAM_offer "$2" "$words"
            ;;
    esac
}

_PROGRAM() {
    local before typed words word number values command='' option='' plain='' operands=0
    COMPREPLY=()
    # bash cuts words also at "=" and ":"; here a word ends at a space.
    before=${COMP_LINE:0:COMP_POINT}
    typed=${before##*[[:blank:]]}
    read -r -a words <<<"${before%"$typed"}"
    for ((number = 1; number < ${#words[@]}; number++)); do
        word=${words[number]}
        if [[ $option ]]; then
            option=''
        elif [[ ! $plain && $word == -- ]]; then
            plain=yes
        elif [[ ! $plain && $word == -?* ]]; then
            if _PROGRAM_option "$command" "$word"; then option=$word; fi
        elif [[ ! $command && $operands == 0 ]] && _PROGRAM_is_command "$word"; then
            command=$word
        else
            operands=$((operands + 1))
        fi
    done
    if [[ $option ]]; then
        _PROGRAM_option "$command" "$option"
        _PROGRAM_value "$values" "$typed"
    elif [[ ! $plain && $typed == --*=* ]]; then
        _PROGRAM_option_and_value "$command" "$typed"
    elif [[ ! $plain && $typed == -* ]]; then
        _PROGRAM_options "$command"
        _PROGRAM_offer "$typed" "$values"
    else
        _PROGRAM_operand "$command $operands"
        _PROGRAM_value "$values" "$typed"
    fi
}

complete -F _PROGRAM PROGRAM
"""

_FOLLOWS: Final = {"file": "-f", "directory": "-d", "mount-options": "mount-options"}


def script(program: Program) -> str:
    """Write the completion of a program."""
    text = "\n".join((_HEAD, *_tables(program))) + _FRAME
    return text.replace("PROGRAM", program.name)


def _tables(program: Program) -> Iterator[str]:
    """Write the functions that tell one program from another; each sets ``values``."""
    named = " ".join(command.name for command in program.commands if command.name)
    plain = program.commands[0].name == ""
    yield from ("_PROGRAM_is_command() {", f"    [[ ' {named} ' == *\" $1 \"* ]]", "}", "")
    cases = [] if plain else [("''", "--help --version")]
    cases += [(_quoted(command.name), _flags(command)) for command in program.commands]
    yield from _function("options", "$1", "$1: the command.", cases)
    cases = [
        (_patterns(command, option.flags), _follow(option.value))
        for command in program.commands
        for option in command.options
        if option.value is not None
    ]
    note = "$1: the command; $2: an option of it.  Fails if no value follows."
    yield from _function("option", "$1 $2", note, cases, otherwise="return 1")
    cases = [("' 0'", f"-f {named}" if plain else named)]
    cases += [case for command in program.commands for case in _operands(command)]
    note = "$1: the command, and how many words that are no options it has already."
    yield from _function("operand", "$1", note, cases)
    words = mount_words() if plain else {}
    every = " ".join(word if choice is None else f"{word}=" for word, choice in words.items())
    yield from ("_PROGRAM_mount_words() {", f"    values='{every}'", "}", "")
    cases = [(word, " ".join(choices)) for word, choices in words.items() if choices]
    cases += [("backing_dir", "-d"), ("overlay", "-f")] if plain else []
    yield from _function("word_value", "$1", "$1: a word behind -o that has a value.", cases)


def _function(
    name: str, key: str, note: str, cases: Iterable[tuple[str, str]], otherwise: str = "values=''"
) -> Iterator[str]:
    """Write a function that is a table."""
    yield f"_PROGRAM_{name}() {{"
    yield f"    # {note}"
    yield f'    case "{key}" in'
    for pattern, values in cases:
        yield f"        {pattern}) values={_quoted(values)} ;;"
    yield f"        *) {otherwise} ;;"
    yield from ("    esac", "}", "")


def _operands(command: Command) -> Iterator[tuple[str, str]]:
    """Write what each word of a command may be."""
    for number, (operand, value) in enumerate(command.places()):
        pattern = f"'{command.name} '*" if operand.repeats else f"'{command.name} {number}'"
        yield pattern, _follow(value)


def _flags(command: Command) -> str:
    """List the options of a command."""
    flags = [flag for option in command.options for flag in option.flags]
    return " ".join(dict.fromkeys((*flags, "--help")))


def _patterns(command: Command, flags: Iterable[str]) -> str:
    """Write what an option of a command looks like to the table."""
    return " | ".join(f"'{command.name} {flag}'" for flag in flags)


def _follow(value: Value) -> str:
    """Say what follows: a kind of name, or one of some words."""
    return " ".join(value.words) if value.words else _FOLLOWS.get(value.kind, "")


def _quoted(text: str) -> str:
    """Quote for the shell; no word of ours has a quote in it."""
    return f"'{text}'"
