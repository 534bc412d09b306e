"""The README's options, commands and exit codes are those of the program."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import qedfuse
from qedfuse.cli.qedfuse.usage import USAGE
from qedfuse.cli.qedimg.main import COMMANDS, command, make_parser
from qedfuse.mount.optionparser import KERNEL_FLAGS, known_options
from qedfuse.remote.libraries import STORE_LIBRARY, WEB_LIBRARY, missing_library

if TYPE_CHECKING:
    import pytest

ROOT = Path(qedfuse.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Return one section of the README."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_columns(text: str) -> str:
    """Return the first column of all tables in a text."""
    return "\n".join(re.findall(r"^\| (.*?) \|", text.replace("\\|", "/"), re.MULTILINE))


def test_every_option_is_documented() -> None:
    """README and --help list the same options as the parser."""
    known = set(known_options()) - KERNEL_FLAGS
    table = section("Use").split("| `-o` |")[1]
    documented = set(re.findall(r"`([a-z_]+)", first_columns(table)))
    assert documented - KERNEL_FLAGS == known
    usage = USAGE.split("show the version\n")[1].split('"umount"')[0]
    for word in known:
        assert re.search(rf"^  .*\b{word}\b", usage, re.MULTILINE), word


def test_every_argument_is_documented() -> None:
    """README and --help list the same arguments of a mount."""
    found = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")
    table = section("Use").split("| `-o` |")[0]
    documented = set(found.findall(first_columns(table)))
    assert documented - {"-o"} == set(found.findall(USAGE)) - {
        "-o", "-s", "--timeout", "--output", "--watch",
    }  # fmt: skip


def test_every_command_is_documented() -> None:
    """The README lists the commands of the toolbox in the order of its help."""
    listed = re.findall(r"^\| `qedimg (\w+)` \|", section("The toolbox"), re.MULTILINE)
    assert listed == list(COMMANDS)


def test_exit_codes_agree() -> None:
    """README and --help list the same exit codes."""
    codes = re.findall(r"^\| (\d+) \|", section("Exit codes"), re.MULTILINE)
    usage = USAGE.split("Exit codes:")[1]
    assert codes == re.findall(r"\b(\d+) [a-zA-Z]", usage)


def test_links_lead_somewhere() -> None:
    """Every relative link of the README and the docs names an existing file."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_raw_sources_have_a_stated_format() -> None:
    """No documented command lets the guest of a raw disk choose the format of the source."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.sh")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    text += "\n" + "\n".join(command(name).EXAMPLE for name in COMMANDS)
    found = re.findall(r"\bqedimg (convert|compare|measure) ([^`#\n]*\.raw\b[^`#\n]*)", text)
    stated = 0
    for name, words in found:
        given = vars(make_parser(name).parse(shlex.split(words)))
        for operand in ("source", "first", "second"):
            if given.get(operand, "").endswith(".raw"):
                assert given[f"{operand}_format"] == "raw", words
                stated += 1
    assert stated > len(found) / 2


def test_the_libraries_for_servers_agree() -> None:
    """Every text about the libraries names the environment's pip, and the versions of the code."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extra = settings["project"]["optional-dependencies"]["remote"]
    assert sorted(extra) == sorted([STORE_LIBRARY, WEB_LIBRARY])
    command = f"qedfuse/bin/pip install '{STORE_LIBRARY}' '{WEB_LIBRARY}'"
    for name in ("README.md", "docs/remote.md", "examples/golden-image-in-a-bucket.sh"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert command in text
        assert "qedfuse[remote]" not in text  # no index has a package of this name
    control = (ROOT / "packaging/debian/control").read_text(encoding="utf-8")
    assert f" python3-{WEB_LIBRARY.replace('>=', ' (>= ')})," in control


def test_a_missing_library_without_a_virtual_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's Python, as of the Debian package, gets no advice to run its pip."""
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    texts = [missing_library(is_web=is_web) for is_web in (True, False)]
    rows = (ROOT / "docs" / "bad-input.md").read_text(encoding="utf-8")
    for text in texts:
        assert "pip" not in text
        assert f"`{text.partition('(')[2].rstrip(')')}`)" in rows
    monkeypatch.setattr(sys, "prefix", "/a b")
    assert "install it with: '/a b/bin/python' -m pip install 'urllib3>=2.2'" in missing_library(
        is_web=True
    )
