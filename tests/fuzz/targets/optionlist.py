"""Lists of mount options: refused in one line, or the same after they were made absolute."""

from __future__ import annotations

import os
from typing import Final

from qedfuse.errors import UsageError
from qedfuse.mount.optionparser import is_in_effect, known_options, parse_options
from qedfuse.mount.optionsyntax import absolute_options, escape_value, split_options
from tests.fuzz.targets.target import Target, assert_line

_PATHS: Final = ("overlay=", "backing_dir=", "cache_dir=", "credentials=")


def check(data: bytes) -> None:
    """Parse the options after the first byte, which selects ``-s`` of mount(8)."""
    sloppy = bool(data[:1]) and data[0] % 2 == 1
    text = os.fsdecode(data[1:])
    absolute = absolute_options([text])
    assert len(absolute) == len(split_options(text))
    assert absolute_options(absolute) == absolute
    for option in absolute:
        assert len(split_options(option)) == 1
        assert escape_value(split_options(option)[0]) == option
    try:
        options = parse_options([text], sloppy=sloppy)
    except UsageError as error:
        assert_line(error)
        return
    again = parse_options(absolute, sloppy=sloppy)
    assert parse_options(absolute, sloppy=sloppy) == again
    if not any(option.startswith(_PATHS) for option in absolute):
        assert again == options
    if len(absolute) == 1:
        option = split_options(absolute[0])[0]
        assert option == "rw" or is_in_effect(option, again, sloppy=sloppy)


def seeds() -> list[bytes]:
    """Return each option, with each of its values."""
    options = []
    for name, values in known_options().items():
        if values is None:
            options.append(name)
        elif values:
            options += [f"{name}={value}" for value in values]
        else:
            options += [f"{name}={value}" for value in ("1", "64K", "/a", "https://h/", "off")]
    return [b"\0" + option.encode() for option in options] + [
        b"\1ro,overlay=a\\,b\\\\c,unknown=x,backing_dir=..",
        b"\0" + ",".join(options).encode()[:1900],
    ]


TARGET: Final = Target(
    check,
    seeds,
    (
        b",",
        b"\\",
        b"\\,",
        b"=",
        b"=0",
        b"=-1",
        b"\xff",
        b"\x00",
        b"9" * 13,
        b"\xd9\xa1",
        b"1e3",
        b"K",
        *tuple(name.encode() for name in known_options()),
    ),
)
