"""Parsing the value of an option of ``-o``.

Each function raises UsageError for a value that it does not accept.  The message names the option.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, TypeVar

from qedfuse.errors import UsageError
from qedfuse.remote.address import is_url, parse_prefix
from qedfuse.remote.options import MIN_CACHE_BYTES
from qedfuse.remote.options import parse_deadline as deadline_in
from qedfuse.text import printable
from qedfuse.util.durations import parse_duration
from qedfuse.util.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.mount.system.listenaddress import ListenAddress
    from qedfuse.mount.system.readahead import Readahead
    from qedfuse.remote.address import Address

_Value = TypeVar("_Value")

_MAX_ID: Final = (1 << 32) - 2
"""Largest id of a user or a group.  For chown(2), the next number means "unchanged"."""
_MAX_PARTITION: Final = 255
"""Largest number of a partition in Linux."""
_MAX_SECONDS: Final = 3600.0
"""Largest value of an option in seconds; options that concern servers have another limit."""
_MAX_POLL_MICROSECONDS: Final = 10_000
"""Largest value of the option ``poll``."""
_MIN_CACHE_BYTES: Final = 64 << 10
"""Smallest value of the option ``cache_size``."""
_MAX_READAHEAD_BYTES: Final = 1 << 30
"""Largest value of the option ``readahead``."""


def choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return ``value`` unchanged if it is one of ``choices``."""
    if value not in choices:
        msg = f"option {name}: found {printable(value)}, expected {' or '.join(choices)}"
        raise UsageError(msg)
    return value


def _number(name: str, value: str, base: int, maximum: int, expected: str) -> int:
    """Parse an integer up to ``maximum``, in ``base`` 8 or 10; messages end with ``expected``."""
    digits = "[0-7]{1,12}" if base == 8 else "[0-9]{1,12}"  # noqa: PLR2004  octal
    if not re.fullmatch(digits, value) or (number := int(value, base)) > maximum:
        msg = f"option {name}: found {printable(value)}, expected {expected}"
        raise UsageError(msg)
    return number


def parse_id(name: str, value: str) -> int:
    """Parse the id of a user or a group, a number of at most `_MAX_ID`."""
    return _number(name, value, 10, _MAX_ID, f"a number up to {_MAX_ID}")


def parse_partition(name: str, value: str) -> int:
    """Parse the number that Linux gives to a partition, from 1 to `_MAX_PARTITION`."""
    expected = f"the number of a partition, from 1 to {_MAX_PARTITION}"
    number = _number(name, value, 10, _MAX_PARTITION, expected)
    if not number:
        msg = f"option {name}: found 0, expected {expected}"
        raise UsageError(msg)
    return number


def parse_umask(name: str, value: str) -> int:
    """Parse octal permission bits, at most 0o777."""
    return _number(name, value, 8, 0o777, "octal permission bits up to 777")


def parse_seconds(name: str, value: str) -> float:
    """Parse a time in seconds, more than 0 and at most `_MAX_SECONDS`."""
    return _named(name, lambda: parse_duration(value, _MAX_SECONDS))


def parse_deadline(name: str, value: str) -> float:
    """Parse a time limit for servers in seconds; see `qedfuse.remote.options.parse_deadline`."""
    return _named(name, lambda: deadline_in(value))


def parse_poll(name: str, value: str) -> float:
    """Parse 0 to `_MAX_POLL_MICROSECONDS` microseconds, or ``off`` for 0; return seconds."""
    if value == "off":
        return 0.0
    expected = f"microseconds up to {_MAX_POLL_MICROSECONDS}, or off"
    return _number(name, value, 10, _MAX_POLL_MICROSECONDS, expected) * 1e-6


def parse_readahead(name: str, value: str) -> Readahead:
    """Parse the maximum read-ahead: ``kernel``, or 0 to `_MAX_READAHEAD_BYTES` bytes."""
    if value == "kernel":
        return "kernel"
    size = parse_bytes(name, value)
    if size > _MAX_READAHEAD_BYTES:
        msg = f"option {name}: found {printable(value)}, expected at most 1G, or kernel"
        raise UsageError(msg)
    return size


def parse_bytes(name: str, value: str) -> int:
    """Parse a number of bytes with an optional unit."""
    return _named(name, lambda: parse_size(value))


def parse_table_cache(name: str, value: str) -> int:
    """Parse the size of the table cache in bytes, at least `_MIN_CACHE_BYTES`."""
    size = parse_bytes(name, value)
    if size < _MIN_CACHE_BYTES:
        msg = f"option {name}: found {printable(value)}, expected at least 64K"
        raise UsageError(msg)
    return size


def parse_remote_cache(name: str, value: str) -> int:
    """Parse the size of the cache for remote files in bytes, at least 1 MiB."""
    size = parse_bytes(name, value)
    if size < MIN_CACHE_BYTES:
        msg = f"option {name}: found {printable(value)}, expected at least 1M"
        raise UsageError(msg)
    return size


def parse_local_path(name: str, value: str) -> str:
    """Return ``value``, a path on this machine, unchanged; refuse a URL."""
    if is_url(value):
        hint = " (for URLs: backing_url)" if name == "backing_dir" else ""
        msg = f"option {name}: found a URL, expected a path on this machine{hint}"
        raise UsageError(msg)
    return value


def parse_metrics(name: str, value: str) -> ListenAddress:
    """Parse the address at which the metrics are served, as `ListenAddress.parse` does."""
    # Imported late, because only this option needs sockets.
    from qedfuse.mount.system.listenaddress import ListenAddress  # noqa: PLC0415  late, see above

    return ListenAddress.parse(name, value)


def parse_prefix_url(name: str, value: str) -> Address:
    """Parse a URL that is the prefix of allowed URLs of backing files."""
    return _named(name, lambda: parse_prefix(value))


def _named(name: str, parse: Callable[[], _Value]) -> _Value:
    """Return the result of ``parse``; put the name of the option in front of its UsageError."""
    try:
        return parse()
    except UsageError as error:
        msg = f"option {name}: {error}"
        raise UsageError(msg) from error
