"""The man pages and completions in ``docs/share/`` match the programs."""

from __future__ import annotations

import re
import subprocess
import tomllib
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.cli.pages import programs, roff, tree
from qedfuse.cli.qedfuse.arguments import parse_arguments
from qedfuse.cli.qedfuse.usage import USAGE
from qedfuse.mount.optionparser import parse_options
from tests.support.sandbox import ROOT

if TYPE_CHECKING:
    from pathlib import Path

SHARE: Final = ROOT / "docs" / "share"
PAGES: Final = ("man/man1/qedimg.1", "man/man8/qedfuse.8")


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """Return all files as they should be, by name."""
    return tree.files()


def test_shipped_files_are_up_to_date(made: dict[str, str]) -> None:
    """The shipped files are current; if not, run ``python -m qedfuse.cli.pages``."""
    shipped = {
        str(path.relative_to(SHARE)): path.read_text(encoding="utf-8")
        for path in SHARE.rglob("*")
        if path.is_file()
    }
    assert shipped.keys() == made.keys()
    assert [name for name, text in made.items() if shipped[name] != text] == []


def test_everything_is_installed(made: dict[str, str]) -> None:
    """The build installs each file where it is looked for."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    directories = settings["tool"]["setuptools"]["data-files"]
    assert all(patterns == [f"docs/{directory}/*"] for directory, patterns in directories.items())
    assert {f"share/{name}".rpartition("/")[0] for name in made} == directories.keys()


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(
    "command",
    [
        ["groff", "-man", "-Tutf8", "-ww", "-z"],
        # Not -Wall: it would also check other installed pages and the date.
        ["mandoc", "-Tlint", "-Wstyle"],
    ],
    ids=lambda command: command[0],
)
def test_formatters_accept_the_pages(command: list[str], page: str) -> None:
    """Neither formatter reports anything about the pages."""
    done = subprocess.run([*command, SHARE / page], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def rendered(path: Path) -> str:
    """Format a page as man(1) does, without bold letters, as one line."""
    done = subprocess.run(
        ["mandoc", "-Tascii", "-O", "width=200", path], capture_output=True, text=True, check=True
    )
    return " ".join(re.sub(".\b", "", done.stdout).split())


def test_the_qedimg_page_is_complete(made: dict[str, str], tmp_path: Path) -> None:
    """The page has all commands, options, examples and exit codes."""
    page = tmp_path / "qedimg.1"
    page.write_text(made[PAGES[0]], encoding="utf-8")
    text = rendered(page)
    for command in programs.qedimg().commands:
        assert f"qedimg {command.name} [OPTION...] " in text
        assert " ".join(command.description.split()) in text
        assert f"Example: {' '.join(command.example.split())}" in text
        for option in command.options:
            assert ", ".join(option.flags) in text
            assert " ".join(option.help.split()) in text
        for code, meaning in command.exit_codes.items():
            assert f"{code} {meaning}" in text


def test_the_qedfuse_page_is_complete(made: dict[str, str], tmp_path: Path) -> None:
    """The page has all options, words of -o and exit codes."""
    page = tmp_path / "qedfuse.8"
    page.write_text(made[PAGES[1]], encoding="utf-8")
    text = rendered(page)
    for words, meaning in programs.mount_option_help():
        assert f"{words} {meaning}" in text
    words_on_page = re.findall(r"\w+", " ".join(words for words, _ in programs.mount_option_help()))
    words_on_page += ["nosuid", "nodev", "noexec", "noatime", "sync", "dirsync"]
    assert set(programs.mount_option_values()) <= set(words_on_page)
    for code, meaning in programs.exit_codes():
        assert f"{code} {meaning}" in text
    flags = [flag for option in programs.qedfuse().commands[0].options for flag in option.flags]
    assert set(flags) <= set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", USAGE))
    assert [flag for flag in flags if flag not in text] == []


def test_listed_mount_options_are_accepted() -> None:
    """Each word of -o is accepted, alone or with one of its values."""
    numbers = {
        "umask": "077",
        "commit": "5",
        "compact_time": "1",
        "metrics": "9000",
        "overlay": "x",
        "partition": "1",
        "backing_dir": "x",
        "backing_url": "https://example.org/",
        "cache_dir": "x",
        "credentials": "x",
        "remote_attempt_timeout": "5",
        "remote_cache_size": "1G",
        "remote_connect_timeout": "5",
        "remote_timeout": "5",
    }
    for word, choices in programs.mount_option_values().items():
        value = "" if choices is None else f"={(*choices, numbers.get(word, '65536'))[0]}"
        if word == "poll":
            value = "=off"
        parse_options([word + value])


def test_listed_flags_are_accepted() -> None:
    """Each option of the help is accepted, with a value exactly if it has one."""
    for option in programs.qedfuse().commands[0].options:
        for flag in option.flags:
            words = [flag] if option.value is None else [flag, "value"]
            assert parse_arguments([*words, "a", "b"]).paths == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    [r"back\slash", "-dash--", "'quote'", '"double"', ".dot", "a ^ b ~ c ` d", r"\fB \(aq \n"],
)
def test_text_survives_roff(text: str, tmp_path: Path) -> None:
    """Text that roff would interpret is shown literally, also at the start of a line."""
    page = tmp_path / "page.1"
    lines = ['.TH X 1 2026-01-01 "x"', ".SH NAME", r"x \- y", ".SH TEXT"]
    lines += [*roff.example(text), ".SH END", ".TP", roff.bold(text), "x"]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert rendered(page).count(text) == 2


def test_paragraphs() -> None:
    """Each sentence gets its own line, examples are unchanged, and back quotes mark words."""
    text = "One `-x`\nline.  Two; see mount(8).\n\n    as  it is\n\nLast."
    assert list(roff.paragraphs(text)) == [
        r"One \fB\-x\fR line.",
        r"Two;" + r" see \fBmount\fR(8).",
        ".PP",
        *(".RS 4", ".EX", "as  it is", ".EE", ".RE"),
        ".PP",
        "Last.",
    ]
