"""Each error class has an errno for the guest and an exit code for scripts."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import qedfuse
from qedfuse import errors
from qedfuse.errors import HostError, NoSpaceError, QedError, RemoteError, cannot_open

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
    """The tree in errors.py shows the errno and the exit code of each class."""
    symbol, code = drawn()[kind.__name__]
    assert kind.exit_code == code
    assert symbol == "(host's)" or kind.errno == getattr(errno, symbol) or kind is NoSpaceError
    assert 0 < kind.exit_code < 256
    assert kind.errno in errno.errorcode


def test_nothing_else_is_drawn() -> None:
    """The tree in errors.py shows no class that does not exist."""
    assert {kind.__name__ for kind in tree()} == drawn().keys()


def test_every_exit_code_is_documented() -> None:
    """The README lists every exit code."""
    assert {kind.exit_code for kind in tree()} <= documented_codes()


def test_only_kinds_that_a_script_treats_alike_share_a_code() -> None:
    """A class has the exit code of its parent, or one that no other branch of the tree has."""
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
    """A HostError has the errno of the host's error."""
    error = HostError.from_os(OSError(number, "ignored"), "a.qed", "cannot read")
    assert type(error) is HostError
    assert error.errno == number
    assert str(error).startswith("a.qed: cannot read: ")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_host_is_no_space(number: int) -> None:
    """ENOSPC and EDQUOT become NoSpaceError, other errors do not."""
    error = HostError.from_os(OSError(number, "ignored"), "a.qed", "cannot write")
    assert type(error) is NoSpaceError
    assert error.errno == number


def test_an_errno_is_always_there() -> None:
    """A host error without a number becomes EIO for the guest."""
    assert HostError.from_os(OSError("strange"), "a.qed", "cannot read").errno == errno.EIO


def test_name_is_escaped() -> None:
    """A file name with a newline gives a message of one line."""
    error = cannot_open("a\nb.qed", OSError(errno.ENOENT, "ignored"))
    assert str(error) == "a\\nb.qed: cannot open: No such file or directory"


def test_a_renamed_error_is_of_the_same_kind() -> None:
    """An error whose file gets another name keeps its class and its attributes."""
    error = RemoteError("a/.b.part: cannot read a/.b.part", errno.EACCES)
    error.is_logged = True
    found = error.renamed("a/.b.part", "a/b")
    assert type(found) is RemoteError
    assert str(found) == "a/b: cannot read a/b"
    assert (found.errno, found.is_logged) == (errno.EACCES, True)
    assert str(error) == "a/.b.part: cannot read a/.b.part"


def test_a_prefixed_error_is_of_the_same_kind() -> None:
    """An error whose message gets a prefix keeps its class and its attributes."""
    error = RemoteError("https://h/a: found HTTP status 503", errno.EACCES)
    error.is_logged = True
    found = error.prefixed("vm.qed: backing file ")
    assert type(found) is RemoteError
    assert str(found) == "vm.qed: backing file https://h/a: found HTTP status 503"
    assert (found.errno, found.is_logged) == (errno.EACCES, True)
    assert str(error) == "https://h/a: found HTTP status 503"
