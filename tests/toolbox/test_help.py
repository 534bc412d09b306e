"""The help of the program and of each command that it lists."""

from __future__ import annotations

import re
import shlex
from typing import Final

import pytest

from qedfuse.cli.qedimg import main as program
from tests.support.sandbox import ROOT

SCREEN_LINES: Final = 24
SCREEN_COLUMNS: Final = 80


def test_help_fits_a_screen() -> None:
    """The usage lists every command and fits on a screen with the prompt below it."""
    lines = program.usage().splitlines()
    assert len(lines) < SCREEN_LINES
    assert max(map(len, lines)) < SCREEN_COLUMNS
    for name, summary in program.COMMANDS.items():
        assert [line for line in lines if line.split()[:1] == [name] and summary in line]


def test_every_exit_code_is_documented() -> None:
    """The usage lists each exit code, and the page for users of qemu-img explains it."""
    usage = " ".join(program.usage().split()).partition("Exit codes: ")[2]
    assert [int(code) for code in re.findall(r"\b(\d+) [a-zA-Z]", usage)] == [*program.EXIT_CODES]
    page = (ROOT / "docs" / "coming-from-qemu-img.md").read_text(encoding="utf-8")
    cells = re.findall(r"(?m)^\| all(?: others)? \| ([^|]*) \|", page)
    listed = set(map(int, re.findall(r"\d+", ", ".join(cells)))) | {*range(12, 18)}
    assert "12 to 17" in cells
    assert listed == {*program.EXIT_CODES}


@pytest.mark.parametrize("name", program.COMMANDS)
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The help of a command has a description, an example and exit codes, in lines that fit."""
    assert program.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: qedimg {name} ")
    assert max(map(len, text.splitlines())) < SCREEN_COLUMNS
    assert re.search(rf"\n\nExample:\n  qedimg {name} \S", text)
    assert "\n\nExit codes: 0 " in text
    assert " ".join(program.command(name).DESCRIPTION.split()) in " ".join(text.split())


@pytest.mark.parametrize("name", program.COMMANDS)
def test_the_example_is_accepted(name: str) -> None:
    """The command's own parser accepts its example."""
    words = shlex.split(program.command(name).EXAMPLE.split("|")[0])
    assert words[:2] == ["qedimg", name]
    parsed = vars(program.make_parser(name).parse(words[2:]))
    assert not parsed["quiet"]


@pytest.mark.parametrize("name", program.COMMANDS)
def test_every_option_has_a_help(name: str) -> None:
    """The help of each option is a phrase without a full stop."""
    for action in program.make_parser(name)._actions:
        if action.option_strings:
            assert action.help, action.option_strings
            assert not action.help.endswith("."), action.option_strings
