"""What subcommands print with."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

import pytest

from qedfuse.cli.qedimg import arguments as common
from qedfuse.cli.qedimg.output import print_json, say, table

if TYPE_CHECKING:
    from qedfuse.disk.options import OpenOptions


def test_quiet_silences_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing else is silenced."""
    for quiet in (False, True):
        say(argparse.Namespace(quiet=quiet), "done")
        print_json({})
    assert capsys.readouterr().out == "done\n{}\n{}\n"


def test_json_holds_any_name(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no text comes back as the bytes that it is."""
    name = b"caf\xe9 \xe2\x82\xac\n.qed"
    print_json({"filename": os.fsdecode(name)})
    text = capsys.readouterr().out
    assert text.isascii()
    assert os.fsencode(json.loads(text)["filename"]) == name


def test_table_lines_up() -> None:
    """Text to the left, figures to the right, nothing after the last column."""
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


def test_options_are_safe_unless_told_otherwise() -> None:
    """Backing files are confined, locks honoured, nothing is changed."""
    found = options()
    assert (found.writable, found.force_share) == (False, False)
    assert (found.backing.mode, found.backing.directories) == ("confined", ())


def test_options_as_given() -> None:
    """Each reaches the library."""
    found = options(
        *("-U", "--backing", "any", "--backing-dir", "/a"),
        *("--backing-dir", "/b", "--backing-format", "raw"),
    )
    assert found.force_share
    assert found.backing.mode == "any"
    assert found.backing.directories == ("/a", "/b")
    assert found.backing.format == "raw"


def test_nobody_writes_beside_a_writer() -> None:
    """-U is for reading."""
    found = options("-U", writable=True)
    assert (found.writable, found.force_share) == (True, False)


def test_options_of_a_command_that_has_none() -> None:
    """Only those are looked at that the subcommand has."""
    found = common.open_options(argparse.Namespace(), trusted="/base.raw")
    assert found.backing.mode == "confined"
    assert found.backing.trusted == "/base.raw"


@pytest.mark.parametrize(("text", "size"), [("10G", 10 << 30), ("512", 512), ("64KiB", 65536)])
def test_sizes(text: str, size: int) -> None:
    """As everywhere in the project."""
    assert common.size(text) == size


@pytest.mark.parametrize("text", ["", "x", "1.5G", "-1", "1Q"])
def test_no_sizes(text: str) -> None:
    """The parser makes one line of it, with what was found."""
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number of bytes"):
        common.size(text)
