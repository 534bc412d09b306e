"""Each error has what both of its readers need: an errno for a guest, an exit code for a script."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qedfuse
from qedfuse import errors
from qedfuse.errors import HostError, NoSpaceError, QedError, cannot_open

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(qedfuse.__file__).parents[1]


def tree(kind: type[QedError] = QedError) -> Iterator[type[QedError]]:
    """List the classes of errors.py."""
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


def drawn() -> dict[str, tuple[str, int]]:
    """Read the tree that the module's docstring draws: name to errno and exit code."""
    line = re.compile(r"^[\s│├└─]*(\w+Error)\s+(\S+)\s+(\d+)  ", re.MULTILINE)
    assert errors.__doc__ is not None
    return {name: (symbol, int(code)) for name, symbol, code in line.findall(errors.__doc__)}


def documented_codes() -> set[int]:
    """Read the exit codes from the README's table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Exit codes\n")[1].split("\n## ")[0]
    return {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}


@pytest.mark.parametrize("kind", list(tree()), ids=lambda kind: kind.__name__)
def test_every_error_is_drawn_as_it_is(kind: type[QedError]) -> None:
    """The drawing tells errno and exit code of each class, and they are right."""
    symbol, code = drawn()[kind.__name__]
    assert kind.exit_code == code
    assert symbol == "(host's)" or kind.errno == getattr(errno, symbol) or kind is NoSpaceError
    assert 0 < kind.exit_code < 256
    assert kind.errno in errno.errorcode


def test_nothing_else_is_drawn() -> None:
    """A class that has gone has left the drawing too."""
    assert {kind.__name__ for kind in tree()} == drawn().keys()


def test_every_exit_code_is_documented() -> None:
    """A script's author finds every code in the README."""
    assert {kind.exit_code for kind in tree()} <= documented_codes()


def test_only_kinds_that_a_script_treats_alike_share_a_code() -> None:
    """A class has the code of its parent, or one that no other branch has."""
    owners: dict[int, type[QedError]] = {}
    for kind in tree():
        owner = owners.setdefault(kind.exit_code, kind)
        # A write to a read-only disk is, to a command's caller, a wrong use of it.
        assert issubclass(kind, owner) or (owner.__name__, kind.__name__) == (
            "UsageError",
            "ReadOnlyError",
        )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOENT])
def test_host_error_keeps_the_hosts_errno(number: int) -> None:
    """What the host said reaches whoever asked."""
    error = HostError.from_os(OSError(number, "ignored"), "a.qed", "cannot read")
    assert type(error) is HostError
    assert error.errno == number
    assert str(error).startswith("a.qed: cannot read: ")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_host_is_no_space(number: int) -> None:
    """A full file system and a used-up quota can be told from other failures."""
    error = HostError.from_os(OSError(number, "ignored"), "a.qed", "cannot write")
    assert type(error) is NoSpaceError
    assert error.errno == number


def test_an_errno_is_always_there() -> None:
    """An error of the host without a number still gives the guest one."""
    assert HostError.from_os(OSError("strange"), "a.qed", "cannot read").errno == errno.EIO


def test_name_is_escaped() -> None:
    """A name cannot forge a second line."""
    error = cannot_open("a\nb.qed", OSError(errno.ENOENT, "ignored"))
    assert str(error) == "a\\nb.qed: cannot open: No such file or directory"
