"""Functions and options that subcommands share."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

import pytest

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_json, print_line, table
from qedfuse.errors import UsageError
from qedfuse.mount.optionparser import parse_options
from qedfuse.remote.options import Deadlines

if TYPE_CHECKING:
    from qedfuse.disk.options import OpenOptions


def test_quiet_silences_messages_only(capsys: pytest.CaptureFixture[str]) -> None:
    """-q silences messages, but not results."""
    for quiet in (False, True):
        print_line(argparse.Namespace(quiet=quiet), "done")
        print_json({})
    assert capsys.readouterr().out == "done\n{}\n{}\n"


def test_json_holds_any_name(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON holds a name that is not UTF-8 such that its bytes can be restored."""
    name = b"caf\xe9 \xe2\x82\xac\n.qed"
    print_json({"filename": os.fsdecode(name)})
    text = capsys.readouterr().out
    assert text.isascii()
    assert os.fsencode(json.loads(text)["filename"]) == name


def test_table_lines_up() -> None:
    """Text is aligned left, numbers right, and lines have no trailing spaces."""
    text = table([("Name", "Bytes", "What"), ("a", 1, "x"), ("bcdef", 1000000, "")], right=(1,))
    assert text.splitlines() == [
        "Name     Bytes  What",
        "a            1  x",
        "bcdef  1000000",
    ]


def parsed(*words: str) -> argparse.Namespace:
    """Parse the options that subcommands share."""
    parser = argparse.ArgumentParser()
    common.add_output(parser)
    common.add_share(parser)
    common.add_backing(parser)
    common.add_progress(parser)
    return parser.parse_args(words)


def options(*words: str, writable: bool = False) -> OpenOptions:
    """Make the options for opening from words."""
    return common.open_options(parsed(*words), writable=writable)


def test_options_are_safe_by_default() -> None:
    """By default backing files are confined, locks are honoured and nothing is written."""
    found = options()
    assert (found.writable, found.force_share) == (False, False)
    assert (found.backing.mode, found.backing.directories) == ("confined", ())


def test_options_reach_the_library() -> None:
    """Each shared option reaches the library."""
    found = options(
        *("-U", "--backing", "any", "--backing-dir", "/a"),
        *("--backing-dir", "/b", "--backing-format", "raw"),
    )
    assert found.force_share
    assert found.backing.mode == "any"
    assert found.backing.directories == ("/a", "/b")
    assert found.backing.format == "raw"


@pytest.mark.parametrize(
    ("words", "deadlines"),
    [
        ((), Deadlines(5, 10, 60)),
        (("--remote-connect-timeout", "2"), Deadlines(2, 10, 60)),
        (("--remote-connect-timeout", "30"), Deadlines(10, 10, 60)),
        (
            ("--remote-connect-timeout", "30", "--remote-attempt-timeout", "25"),
            Deadlines(25, 25, 60),
        ),
        (("--remote-timeout", "3"), Deadlines(3, 3, 3)),
    ],
)
def test_deadlines_reach_the_library(words: tuple[str, ...], deadlines: Deadlines) -> None:
    """Each time for servers reaches the library; one that exceeds the next longer is reduced."""
    assert options(*words).remote.deadlines == deadlines


@pytest.mark.parametrize("text", ["86400", "86401", "0", "1e3", "nan", "0.25"])
def test_mounts_and_qedimg_accept_the_same_deadlines(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A time for servers is valid in a mount exactly if it is valid in qedimg."""
    is_valid = text in {"86400", "0.25"}
    reason = f"found {text}, expected seconds, more than 0, up to 86400"
    if is_valid:
        expected = Deadlines.limited(5, 10, float(text))
        assert options("--remote-timeout", text).remote.deadlines == expected
        assert parse_options([f"remote_timeout={text}"]).remote.deadlines == expected
        return
    with pytest.raises(SystemExit):
        options("--remote-timeout", text)
    assert reason in capsys.readouterr().err
    with pytest.raises(UsageError) as caught:
        parse_options([f"remote_timeout={text}"])
    assert str(caught.value) == f"option remote_timeout: {reason}"


def test_share_is_ignored_for_writing() -> None:
    """-U does not apply to a command that writes."""
    found = options("-U", writable=True)
    assert (found.writable, found.force_share) == (True, False)


def test_options_of_a_command_that_has_none() -> None:
    """Options that a subcommand lacks have their defaults."""
    found = common.open_options(argparse.Namespace())
    assert found.backing.mode == "confined"
    assert found.backing.trusted is None


@pytest.mark.parametrize(("text", "size"), [("10G", 10 << 30), ("512", 512), ("64KiB", 65536)])
def test_sizes(text: str, size: int) -> None:
    """Sizes accept the units of the whole project."""
    assert common.size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1Q"])
def test_bad_sizes(text: str) -> None:
    """A bad size is an error of the parser that says what was expected."""
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number of bytes"):
        common.size(text)
