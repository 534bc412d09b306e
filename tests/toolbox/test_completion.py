"""Completion, by each of the three shells itself."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.cli.pages import programs
from tests.support.sandbox import ROOT

if TYPE_CHECKING:
    from qedfuse.cli.pages.model import Command

SHARE: Final = ROOT / "docs" / "share"
TIMEOUT: Final = 60.0

Complete = Callable[[str], set[str]]

_BASH: Final = """
. "$1"
COMP_LINE=$2 COMP_POINT=${#2}
"_$3"
[ ${#COMPREPLY[@]} = 0 ] || printf '%s\\n' "${COMPREPLY[@]}"
"""
_FISH: Final = "source $argv[1]; complete -C $argv[2]"


def _run(command: list[str | Path], directory: Path) -> list[str]:
    """Run a shell in a directory; give its lines."""
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=TIMEOUT, check=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.splitlines()


def bash(line: str, directory: Path) -> set[str]:
    """Complete as bash does; what stands before "=" is not repeated."""
    program = line.split(maxsplit=1)[0]
    script = SHARE / "bash-completion/completions" / program
    return set(_run(["bash", "--norc", "-c", _BASH, "bash", script, line, program], directory))


def fish(line: str, directory: Path) -> set[str]:
    """Complete as fish does, which repeats what is there, and tells what words are for."""
    script = SHARE / "fish/vendor_completions.d" / f"{line.split(maxsplit=1)[0]}.fish"
    lines = _run(["fish", "--no-config", "-c", _FISH, script, line], directory)
    typed = line.rpartition(" ")[2]
    prefix = typed[: typed.rfind("=") + 1]
    words = (line.split("\t")[0] for line in lines)
    return {word.removeprefix(prefix).removesuffix("/") for word in words}


def zsh(line: str, directory: Path) -> set[str]:
    """Complete as zsh does; each word of a list comes alone."""
    helper = Path(__file__).with_name("completion.zsh")
    lines = _run(["zsh", "-f", helper, SHARE / "zsh/site-functions", line], directory)
    return {line[8:].strip() for line in lines if line.startswith("offered:")}


SHELLS: Final = {"bash": bash, "zsh": zsh, "fish": fish}


@pytest.fixture(params=SHELLS)
def complete(request: pytest.FixtureRequest, tmp_path: Path) -> Complete:
    """Give a function that completes a line, in a directory with two images and another one."""
    (tmp_path / "vm.qed").touch()
    (tmp_path / "base.qed").touch()
    (tmp_path / "images").mkdir()
    return lambda line: SHELLS[request.param](line, tmp_path)


NAMES: Final = {"vm.qed", "base.qed", "images"}


def test_commands(complete: Complete) -> None:
    """The commands are offered, and nothing else."""
    named = {command.name for command in programs.qedimg().commands}
    assert complete("qedimg ") == named
    assert complete("qedimg ch") == {"check"}


@pytest.mark.parametrize("command", programs.qedimg().commands, ids=lambda command: command.name)
def test_options_of_a_command(complete: Complete, command: Command) -> None:
    """All long options are offered, and none of another command."""
    expected = {option.flags[-1] for option in command.options if len(option.flags[-1]) > 2}
    assert complete(f"qedimg {command.name} --") == {*expected, "--help"}


@pytest.mark.parametrize("command", programs.qedimg().commands, ids=lambda command: command.name)
def test_values_of_a_command(command: Command, tmp_path: Path) -> None:
    """Behind each option with a few values these are offered (by bash, the quickest)."""
    for option in command.options:
        for flag in option.flags if option.value is not None and option.value.words else ():
            assert option.value is not None
            assert bash(f"qedimg {command.name} {flag} ", tmp_path) == set(option.value.words)
            if flag.startswith("--"):
                words = bash(f"qedimg {command.name} {flag}=", tmp_path)
                assert words == set(option.value.words)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qedimg check -r ", {"leaks", "all"}),
        ("qedimg check -r l", {"leaks"}),
        ("qedimg check --output=", {"human", "json"}),
        ("qedimg check ", NAMES),
        ("qedimg dump header v", {"vm.qed"}),
        ("qedimg dump l2 0 v", {"vm.qed"}),
        ("qedimg check -q v", {"vm.qed"}),
        ("qedimg create -b v", {"vm.qed"}),
        ("qedimg resize --backing-dir ", {"images"}),
        ("qedfuse v", {"vm.qed"}),
        ("qedfuse vm.qed im", {"images"}),
        ("qedfuse um", {"umount"}),
        ("qedfuse umount ima", {"images"}),
        ("qedfuse umount --t", {"--timeout"}),
        ("qedfuse --pidfile b", {"base.qed"}),
        ("qedfuse -o backing=", {"any", "confined", "none"}),
        ("qedfuse -o ro,backing=a", {"any"}),
    ],
)
def test_line(complete: Complete, line: str, expected: set[str]) -> None:
    """What may follow is offered, and what may not is not."""
    assert complete(line) == expected


def test_words_of_a_mount(complete: Complete) -> None:
    """All words that ``-o`` takes are offered, each once or with each value."""
    words = {word.rpartition(",")[2].split("=")[0] for word in complete("qedfuse -o ")}
    assert words == programs.mount_words().keys()


def test_words_of_a_mount_behind_a_comma(complete: Complete) -> None:
    """A second word is completed as the first is."""
    words = {word.rpartition(",")[2] for word in complete("qedfuse -o ro,grow")}
    assert words == {"growable"}


@pytest.mark.parametrize("line", ["qedimg create -b vm.qed x.qed 1", "qedimg create --table-size "])
def test_numbers_are_not_completed(line: str, tmp_path: Path) -> None:
    """A size is no name of a file."""
    (tmp_path / "1.qed").touch()
    assert bash(line, tmp_path) == set()
    assert zsh(line, tmp_path) == set()


def test_names_behind_the_double_dash(tmp_path: Path) -> None:
    """No option is offered there."""
    (tmp_path / "--odd.qed").touch()
    assert bash("qedimg check -- --", tmp_path) == {"--odd.qed"}


def test_each_name_of_a_value_is_known() -> None:
    """A value of an option or a command with a new name says here whether it is a file."""
    free = {"SIZE", "[+|-]SIZE", "N", "FORMAT", "KEY=VALUE[,...]", "SECONDS", "OFFSET", "LENGTH"}
    values = [
        value
        for program in (programs.qedimg(), programs.qedfuse())
        for command in program.commands
        for value in (
            *(option.value for option in command.options),
            *(operand.value for operand in command.operands),
        )
        if value is not None and value.kind == "free"
    ]
    assert {value.name for value in values} <= free


@pytest.mark.parametrize(
    "command",
    [["bash", "-n"], ["zsh", "-n"], ["fish", "-n"], ["shellcheck"]],
    ids=lambda command: command[0],
)
def test_syntax(command: list[str]) -> None:
    """The shells themselves find nothing wrong."""
    places = {"zsh": "zsh/site-functions", "fish": "fish/vendor_completions.d"}
    directory = SHARE / places.get(command[0], "bash-completion/completions")
    files = sorted(directory.iterdir())
    assert len(files) == 2
    for file in files:
        done = subprocess.run([*command, file], capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
