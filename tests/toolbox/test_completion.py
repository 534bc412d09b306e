"""Completion, run by each of the three shells."""

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
    """Complete as bash does, which does not repeat the part before "="."""
    program = line.split(maxsplit=1)[0]
    script = SHARE / "bash-completion/completions" / program
    return set(_run(["bash", "--norc", "-c", _BASH, "bash", script, line, program], directory))


def fish(line: str, directory: Path) -> set[str]:
    """Complete as fish does, which repeats the whole word and adds a description."""
    script = SHARE / "fish/vendor_completions.d" / f"{line.split(maxsplit=1)[0]}.fish"
    lines = _run(["fish", "--no-config", "-c", _FISH, script, line], directory)
    typed = line.rpartition(" ")[2]
    prefix = typed[: typed.rfind("=") + 1]
    words = (line.split("\t")[0] for line in lines)
    return {word.removeprefix(prefix).removesuffix("/") for word in words}


def zsh(line: str, directory: Path) -> set[str]:
    """Complete as zsh does, word by word."""
    helper = Path(__file__).with_name("completion.zsh")
    lines = _run(["zsh", "-f", helper, SHARE / "zsh/site-functions", line], directory)
    return {line[8:].strip() for line in lines if line.startswith("offered:")}


SHELLS: Final = {"bash": bash, "zsh": zsh, "fish": fish}


@pytest.fixture(params=SHELLS)
def complete(request: pytest.FixtureRequest, tmp_path: Path) -> Complete:
    """Give a function that completes a line, in a directory with two images and a directory."""
    (tmp_path / "vm.qed").touch()
    (tmp_path / "base.qed").touch()
    (tmp_path / "images").mkdir()
    return lambda line: SHELLS[request.param](line, tmp_path)


NAMES: Final = {"vm.qed", "base.qed", "images"}


def test_commands(complete: Complete) -> None:
    """After the program's name exactly the commands are offered."""
    named = {command.name for command in programs.qedimg().commands}
    assert complete("qedimg ") == named
    assert complete("qedimg ch") == {"check"}


@pytest.mark.parametrize("command", programs.qedimg().commands, ids=lambda command: command.name)
def test_options_of_a_command(complete: Complete, command: Command) -> None:
    """Exactly the long options of the command are offered."""
    expected = {option.flags[-1] for option in command.options if len(option.flags[-1]) > 2}
    assert complete(f"qedimg {command.name} --") == {*expected, "--help"}


@pytest.mark.parametrize("command", programs.qedimg().commands, ids=lambda command: command.name)
def test_values_of_a_command(command: Command, tmp_path: Path) -> None:
    """After an option with fixed values exactly these are offered, in bash."""
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
    """Exactly the words that may follow a line are offered."""
    assert complete(line) == expected


def test_mount_options(complete: Complete) -> None:
    """All words of -o are offered, each once or with each of its values."""
    words = {word.rpartition(",")[2].split("=")[0] for word in complete("qedfuse -o ")}
    assert words == programs.mount_option_values().keys()


def test_mount_options_after_a_comma(complete: Complete) -> None:
    """A second word of -o is completed like the first."""
    words = {word.rpartition(",")[2] for word in complete("qedfuse -o ro,grow")}
    assert words == {"growable"}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "line",
    [
        "qedfuse -o uid=$(touch${IFS}x),r",
        "qedfuse -o 'uid=`touch${IFS}x`,r",
        "qedfuse -o uid=$(touch${IFS}x),backing=",
        "qedfuse -o credentials=$(touch${IFS}x)/",
        "qedimg check --output=$(touch${IFS}x)",
    ],
)
def test_typed_text_is_not_executed(line: str, shell: str, tmp_path: Path) -> None:
    """A command substitution that the user has typed is not executed for a completion."""
    SHELLS[shell](line, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a:b.qed", "a=b.qed"])
def test_names_with_a_separator(name: str, tmp_path: Path) -> None:
    """Bash replaces only the part after the last = or :, so only this part is offered."""
    (tmp_path / name).touch()
    assert bash(f"qedimg info {name[:2]}", tmp_path) == {"b.qed"}


@pytest.mark.parametrize("line", ["qedimg create -b vm.qed x.qed 1", "qedimg create --table-size "])
def test_numbers_are_not_completed(line: str, tmp_path: Path) -> None:
    """No file is offered where a number is expected."""
    (tmp_path / "1.qed").touch()
    assert bash(line, tmp_path) == set()
    assert zsh(line, tmp_path) == set()


def test_names_after_the_double_dash(tmp_path: Path) -> None:
    """After ``--`` files are offered, and no options."""
    (tmp_path / "--odd.qed").touch()
    assert bash("qedimg check -- --", tmp_path) == {"--odd.qed"}


def test_each_placeholder_is_classified() -> None:
    """A new placeholder of a value must be listed here unless it stands for a file."""
    free = {
        *("SIZE", "[+|-]SIZE", "N", "FORMAT", "KEY=VALUE[,...]", "SECONDS", "OFFSET", "LENGTH"),
        *("PREFIX", "URL"),
    }
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
    """The shells and shellcheck accept the scripts."""
    directories = {"zsh": "zsh/site-functions", "fish": "fish/vendor_completions.d"}
    directory = SHARE / directories.get(command[0], "bash-completion/completions")
    files = sorted(directory.iterdir())
    assert len(files) == 2
    for file in files:
        done = subprocess.run([*command, file], capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
