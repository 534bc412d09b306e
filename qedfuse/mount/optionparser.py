"""Parsing the options of ``-o`` into `MountOptions`.

An unknown option is an error.  It may be a misspelt ``ro``, and if it were ignored, the mount would
be writable.  Only ``sloppy`` (``-s`` of mount(8)) drops unknown options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from qedfuse.disk.options import BackingPolicy
from qedfuse.errors import UsageError
from qedfuse.mount.options import MountOptions, validated
from qedfuse.mount.optionsyntax import split_options
from qedfuse.mount.optionvalues import (
    choice,
    parse_bytes,
    parse_deadline,
    parse_id,
    parse_local_path,
    parse_metrics,
    parse_partition,
    parse_poll,
    parse_prefix_url,
    parse_readahead,
    parse_remote_cache,
    parse_seconds,
    parse_table_cache,
    parse_umask,
)
from qedfuse.ondisk.formats import BACKING_FORMATS
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from qedfuse.remote.address import Address

KERNEL_FLAGS: Final = frozenset({"nosuid", "nodev", "noexec", "noatime", "sync", "dirsync"})
"""Mount flags that are passed to the kernel, which enforces them.  There is one exception: with
``direct_io`` the kernel leaves ``sync`` to the handlers of writes (`Operations`)."""

_DROPPED: Final = frozenset(
    {
        *("defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group"),
        *("nofail", "_netdev", "dev", "suid", "exec", "async", "atime", "diratime"),
        *("norelatime", "strictatime", "nostrictatime", "lazytime", "nolazytime"),
        *("silent", "loud", "mand", "nomand", "iversion", "noiversion"),
        *("default_permissions", "kernel_cache", "big_writes"),
        *("symfollow", "nosymfollow"),  # the mount has no symbolic links
        # The kernel never changes the time of access of a file or directory of a FUSE mount.
        # libfuse does not know these options, and would refuse to mount.
        *("relatime", "nodiratime"),
    }
)
"""Options without a value that are dropped: options for mount(8) or systemd, and options of libfuse
on which qedfuse itself decides."""

_DROPPED_WITH_VALUE: Final = frozenset(
    {"comment", "fsname", "subtype", "max_read", "user", "blksize"}
)
"""Options with a value that are dropped.  qedfuse passes its own ``fsname`` and ``subtype`` to the
kernel, and the C extension its own ``max_read`` (``_maxread.c``)."""


def parse_options(lists: Iterable[str], *, sloppy: bool = False) -> MountOptions:
    """Parse lists of options.

    A later option overrides an earlier one.  But all values of ``backing_dir`` and ``backing_url``,
    and all mount flags for the kernel, are kept.

    Args:
        lists: The arguments of all ``-o``, in order.
        sloppy: Whether to drop unknown options (``-s`` of mount(8)) instead of refusing them.

    Raises:
        UsageError: An option is unknown (without ``sloppy``), has an invalid value, lacks a value
            or has a needless one; or two options exclude each other.
    """
    found = _parse((option for text in lists for option in split_options(text)), sloppy=sloppy)
    backing = found.backing
    if found.directories:
        backing["directories"] = tuple(found.directories)
    options = MountOptions(
        **found.fields,
        backing=BackingPolicy(**backing),
        backing_urls=tuple(found.prefixes),
        kernel_flags=tuple(found.kernel_flags),
    )
    return validated(options, explicit_rw=found.fields.get("read_only") is False)


def is_in_effect(option: str, options: MountOptions, *, sloppy: bool = False) -> bool:
    """Return whether an option would leave ``options`` unchanged.

    Paths are compared as text, so the caller must make them absolute (`absolute_options`).

    Args:
        option: One option, without escapes.
        options: The options of a mount.
        sloppy: Whether to return True for an unknown option instead of refusing it.

    Raises:
        UsageError: The option is unknown (without ``sloppy``), has an invalid value, lacks a value
            or has a needless one.
    """
    found = _parse((option,), sloppy=sloppy)
    return (
        all(getattr(options, name) == value for name, value in found.fields.items())
        and all(getattr(options.backing, name) == value for name, value in found.backing.items())
        and set(found.directories) <= set(options.backing.directories)
        and set(found.prefixes) <= set(options.backing_urls)
        and set(found.kernel_flags) <= set(options.kernel_flags)
    )


def known_options() -> dict[str, tuple[str, ...] | None]:
    """Return all options that have an effect, and the possible values of each option.

    The tuple of values is empty if the values cannot be listed, as for a path or a number.  None
    stands for an option without a value.
    """
    return {
        **dict.fromkeys((*_FLAGS, *KERNEL_FLAGS)),
        **{name: choices for table in (_CHOICES, _BACKING) for name, (_, choices) in table.items()},
        **dict.fromkeys((*_VALUES, *_REPEATED), ()),
    }


@dataclass(frozen=True, slots=True)
class _Parsed:
    """The fields that a list of options sets; a field that no option sets is missing.

    Attributes:
        fields: Values for fields of `MountOptions`.
        backing: Values for fields of `BackingPolicy`.
        directories: The values of all ``backing_dir``, in order.
        prefixes: The values of all ``backing_url``, in order.
        kernel_flags: The mount flags for the kernel, in order, as keys.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    backing: dict[str, Any] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)
    prefixes: list[Address] = field(default_factory=list)
    kernel_flags: dict[str, None] = field(default_factory=dict)


def _parse(options: Iterable[str], *, sloppy: bool) -> _Parsed:
    """Parse options without escapes; a later option overrides an earlier one."""
    found = _Parsed()
    for option in options:
        name, equals, value = option.partition("=")
        if name in _FLAGS and not equals:
            found.fields.update(_FLAGS[name])
        elif name in KERNEL_FLAGS and not equals:
            found.kernel_flags[name] = None
        elif name == "backing_dir" and value:
            found.directories.append(parse_local_path(name, value))
        elif name == "backing_url" and value:
            found.prefixes.append(parse_prefix_url(name, value))
        elif name in _BACKING and value:
            found.backing[_BACKING[name][0]] = choice(name, value, _BACKING[name][1])
        elif name in _CHOICES and value:
            found.fields[_CHOICES[name][0]] = choice(name, value, _CHOICES[name][1])
        elif name in _VALUES and value:
            attribute, parse = _VALUES[name]
            found.fields[attribute] = parse(name, value)
        elif not (_is_dropped(name, equals) or (sloppy and not _is_known(name))):
            raise UsageError(_complaint(name, option))
    return found


def _is_dropped(name: str, equals: str) -> bool:
    """Return whether an option is dropped; ``equals`` is empty if the option has no value."""
    if name.lower().startswith("x-"):
        return True
    return name in (_DROPPED_WITH_VALUE if equals else _DROPPED)


def _is_known(name: str) -> bool:
    """Return whether an option of this name has an effect; its form may still be wrong."""
    tables = (_FLAGS, KERNEL_FLAGS, _CHOICES, _BACKING, _VALUES)
    return name in _REPEATED or any(name in table for table in tables)


def _complaint(name: str, option: str) -> str:
    """Return the message for an unknown option, or one with a missing or a needless value."""
    shown = printable(option)
    if name in _VALUES or name in _CHOICES or name in _BACKING or name in _REPEATED:
        return f"option {shown}: found no value, expected {name}=VALUE"
    if name in _FLAGS or name in KERNEL_FLAGS:
        return f"option {shown}: found a value, expected {name} alone"
    return f"option {shown}: unknown"


_FLAGS: Final[Mapping[str, Mapping[str, bool | str]]] = {
    "ro": {"read_only": True},
    "rw": {"read_only": False},
    "allow_other": {"allow_other": True},
    "allow_root": {"allow_root": True},
    "direct_io": {"direct_io": True},
    "force_share": {"force_share": True},
    "growable": {"growable": True},
    "nonempty": {"nonempty": True},
    "discard": {"discard": True},
    "nodiscard": {"discard": False},
    "compact": {"compact": "full"},
    "snapshot": {"snapshot": True},
    "base_changed": {"base_changed": True},
    "allow_http": {"allow_http": True},
    "allow_unpinned": {"allow_unpinned": True},
    "partitions": {"partitions": True},
}
"""Options without a value, and the fields of `MountOptions` that they set."""
_CHOICES: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "compact": ("compact", ("auto", "off", "full")),
    "detect_zeroes": ("detect_zeroes", ("off", "on", "unmap")),
    "freelist": ("free_list", ("on", "off")),
    "prefetch": ("prefetch", ("off", "all")),
    "sandbox": ("sandbox", ("on", "off", "strict")),
    "truncate": ("truncate", ("refuse", "zero")),
}
"""Options with a choice of values: the field of `MountOptions` that each sets, and the values."""
_BACKING: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "backing": ("mode", ("confined", "any", "none")),
    "backing_format": ("format", BACKING_FORMATS),
    "foreign": ("foreign", ("off", "qemu")),
}
"""Options about backing files: the field of `BackingPolicy` that each sets, and the values."""
_VALUES: Final[Mapping[str, tuple[str, Callable[[str, str], Any]]]] = {
    "uid": ("uid", parse_id),
    "gid": ("gid", parse_id),
    "umask": ("umask", parse_umask),
    "commit": ("commit_seconds", parse_seconds),
    "compact_size": ("compact_bytes", parse_bytes),
    "compact_time": ("compact_seconds", parse_seconds),
    "partition": ("partition", parse_partition),
    "cache_size": ("cache_bytes", parse_table_cache),
    "poll": ("poll_seconds", parse_poll),
    "metrics": ("metrics", parse_metrics),
    "readahead": ("readahead", parse_readahead),
    "overlay": ("overlay", parse_local_path),
    "cache_dir": ("remote_cache_directory", parse_local_path),
    "remote_cache_size": ("remote_cache_bytes", parse_remote_cache),
    "remote_timeout": ("remote_seconds", parse_deadline),
    "remote_attempt_timeout": ("remote_attempt_seconds", parse_deadline),
    "remote_connect_timeout": ("remote_connect_seconds", parse_deadline),
    "credentials": ("credentials_file", parse_local_path),
    "memory_limit": ("memory_bytes", parse_bytes),
}
"""Options with a free value: the field of `MountOptions` that each sets, and the parser."""
_REPEATED: Final = ("backing_dir", "backing_url")
"""Options that can be given several times, each time with one more value."""
