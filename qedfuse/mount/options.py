r"""The ``-o`` grammar: words and ``word=value`` between commas, as mount(8) writes them.

A comma that belongs to a value is written ``\,`` and a backslash ``\\``.  Words come
from four sources: our own, mount(8)'s that the kernel acts on, mount(8)'s that are meant
for others (dropped), and libfuse's.  What nobody knows is an error that names it; a
mount that ignores a misspelt ``ro`` is worse than none.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from qedfuse.disk.options import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_COMMIT_SECONDS,
    DEFAULT_COMPACT_BYTES,
    DEFAULT_COMPACT_SECONDS,
    BackingPolicy,
)
from qedfuse.errors import UsageError
from qedfuse.text import printable
from qedfuse.util.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from qedfuse.mount.system.readahead import Readahead

KERNEL_WORDS: Final = frozenset(
    {"nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime", "sync", "dirsync"}
)
"""Words that the kernel acts on; `ro` is not among them because it opens the image too."""

_DROPPED: Final = frozenset(
    {
        *("defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group"),
        *("nofail", "_netdev", "dev", "suid", "exec", "async", "atime", "diratime"),
        *("norelatime", "strictatime", "nostrictatime", "lazytime", "nolazytime"),
        *("silent", "loud", "mand", "nomand", "iversion", "noiversion"),
        *("default_permissions", "kernel_cache", "big_writes"),
        *("symfollow", "nosymfollow"),  # there are no symbolic links in the mount
    }
)
"""Words meant for mount(8) or systemd, and those of libfuse that ask for what is so anyway."""

_DROPPED_WITH_VALUE: Final = frozenset(
    {"comment", "fsname", "subtype", "max_read", "user", "blksize"}
)
"""The same with a value.  We name the source and the type ourselves; how long a read
request may be is agreed with the kernel when the mount begins."""

_PATHS: Final = ("overlay", "backing_dir")
"""Words whose value is a path."""

_MAX_ID: Final = (1 << 32) - 2  # the last one means "unchanged" to chown(2)
_MAX_SECONDS: Final = 3600.0
_MAX_POLL_MICROSECONDS: Final = 10_000
_MIN_CACHE_BYTES: Final = 64 << 10
_MAX_READAHEAD_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What ``-o`` asked for.

    Attributes:
        read_only: Nothing can be changed through the mount (``ro``).
        allow_other: Users other than the caller may see the mount.
        allow_root: Besides the caller, root may.
        uid: Owner of the disks; None for the caller.
        gid: Group of the disks; None for the caller's.
        umask: Permission bits taken from 0666; None leaves the owner's alone.
        direct_io: Nothing is kept in the kernel's cache.
        backing: Which backing files may be used.
        force_share: Read-only, beside a program that writes to the image.
        growable: The disk may be made larger through the mount.
        truncate: What a truncation does, an open with O_TRUNC included: it is refused, or
            fills what it cuts off with zeros.
        commit_seconds: Longest time that changed tables stay in memory only.
        cache_bytes: Memory for tables, for each image.
        discard: Discards give clusters up.
        detect_zeroes: What becomes of zeros that are written (`OpenOptions`).
        free_list: Whether images keep a list of their free space (`OpenOptions`).
        compact: How far the files are compacted when the mount ends (`OpenOptions`).
        compact_bytes: How much ``auto`` may move in each of them.
        compact_seconds: How long ``auto`` may take for all of them together.
        poll_seconds: Longest time for which the next request is polled for; None for
            what suits the machine.
        readahead: How far the kernel reads ahead (`qedfuse.mount.system.readahead`).
        snapshot: Writes are dropped when the mount ends.
        overlay: Writes go to this QED image, made if missing.
        kernel_words: Words for the kernel, from `KERNEL_WORDS`.
    """

    read_only: bool = False
    allow_other: bool = False
    allow_root: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    direct_io: bool = False
    backing: BackingPolicy = BackingPolicy()  # noqa: RUF009  frozen
    force_share: bool = False
    growable: bool = False
    truncate: Literal["refuse", "zero"] = "refuse"
    commit_seconds: float = DEFAULT_COMMIT_SECONDS
    cache_bytes: int = DEFAULT_CACHE_BYTES
    discard: bool = True
    detect_zeroes: Literal["off", "on", "unmap"] = "off"
    free_list: Literal["keep", "on", "off"] = "keep"
    compact: Literal["auto", "off", "full"] = "auto"
    compact_bytes: int = DEFAULT_COMPACT_BYTES
    compact_seconds: float = DEFAULT_COMPACT_SECONDS
    poll_seconds: float | None = None
    readahead: Readahead = None
    snapshot: bool = False
    overlay: str | None = None
    kernel_words: tuple[str, ...] = ()

    def absolute(self) -> MountOptions:
        """Make the paths independent of the working directory."""
        directories = tuple(map(os.path.abspath, self.backing.directories))
        overlay = None if self.overlay is None else os.path.abspath(self.overlay)  # noqa: PTH100
        try:
            working = os.getcwd()  # noqa: PTH109
        except OSError:  # it has been removed; names that need it are not found
            working = "/"
        backing = replace(self.backing, directories=directories, working_directory=working)
        return replace(self, overlay=overlay, backing=backing)

    def reading(self) -> MountOptions:
        """Return the options for a disk of the mount that is read-only."""
        return replace(self, read_only=True, growable=False, compact="off")


def split_options(text: str) -> list[str]:
    r"""Cut at commas, but not at ``\,``; the backslashes that protect something go."""
    words = [""]
    escaped = False
    for char in text:
        if escaped:
            # Only a comma and a backslash need protection.  Before anything else the
            # backslash is itself, as in a path that came from elsewhere.
            words[-1] += char if char in ",\\" else "\\" + char
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == ",":
            words.append("")
        else:
            words[-1] += char
    if escaped:
        words[-1] += "\\"
    return [word for word in words if word]


def absolute_words(texts: Iterable[str]) -> tuple[str, ...]:
    """Split options into words whose paths do not depend on the working directory.

    Each is escaped, so that `parse_options` takes it.
    """
    absolute = []
    for word in (word for text in texts for word in split_options(text)):
        name, _, value = word.partition("=")
        is_path = name in _PATHS and value
        absolute.append(escape_value(f"{name}={os.path.abspath(value)}" if is_path else word))  # noqa: PTH100
    return tuple(absolute)


def wants_remount(texts: Iterable[str]) -> bool:
    """Return whether ``-o`` asks for a change of a mount that is there."""
    return any("remount" in split_options(text) for text in texts)


def escape_value(text: str) -> str:
    """Protect commas and backslashes, so that `split_options` and libfuse give them back."""
    return text.replace("\\", "\\\\").replace(",", "\\,")


def parse_options(texts: Iterable[str], *, sloppy: bool = False) -> MountOptions:
    """Read what stood behind each ``-o``; a later word overrides an earlier one.

    Args:
        texts: The arguments of all ``-o``, in order.
        sloppy: Drop unknown words, as mount(8)'s ``-s`` wants.

    Raises:
        UsageError: A word is unknown, lacks or has a value against the rules, or two
            contradict each other.
    """
    found = _read((word for text in texts for word in split_options(text)), sloppy=sloppy)
    backing = found.backing
    if found.directories:
        backing["directories"] = tuple(found.directories)
    options = MountOptions(
        **found.fields, backing=BackingPolicy(**backing), kernel_words=tuple(found.kernel)
    )
    return _consistent(options, explicit_rw=found.fields.get("read_only") is False)


def is_in_effect(word: str, options: MountOptions, *, sloppy: bool = False) -> bool:
    """Return whether ``options`` already are what a word asks for; others do not matter.

    Paths are compared as they stand; see `absolute_words`.

    Raises:
        UsageError: The word is unknown, or lacks or has a value against the rules.
    """
    found = _read((word,), sloppy=sloppy)
    return (
        all(getattr(options, name) == value for name, value in found.fields.items())
        and all(getattr(options.backing, name) == value for name, value in found.backing.items())
        and set(found.directories) <= set(options.backing.directories)
        and set(found.kernel) <= set(options.kernel_words)
    )


@dataclass(frozen=True, slots=True)
class _Words:
    """What words set, without the defaults.

    Attributes:
        fields: Attributes of `MountOptions`.
        backing: Attributes of `BackingPolicy`.
        directories: The directories of ``backing_dir``.
        kernel: Words for the kernel, in order.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    backing: dict[str, Any] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)
    kernel: dict[str, None] = field(default_factory=dict)


def _read(words: Iterable[str], *, sloppy: bool) -> _Words:
    """Read words; a later one overrides an earlier one.

    Raises:
        UsageError: A word is unknown, or lacks or has a value against the rules.
    """
    found = _Words()
    for word in words:
        name, equals, value = word.partition("=")
        if name in _FLAGS and not equals:
            found.fields.update(_FLAGS[name])
        elif name in KERNEL_WORDS and not equals:
            found.kernel[name] = None
        elif name == "backing_dir" and value:
            found.directories.append(value)
        elif name in _BACKING and value:
            found.backing[_BACKING[name][0]] = _choice(name, value, _BACKING[name][1])
        elif name in _CHOICES and value:
            found.fields[_CHOICES[name][0]] = _choice(name, value, _CHOICES[name][1])
        elif name in _VALUES and value:
            attribute, read = _VALUES[name]
            found.fields[attribute] = read(name, value)
        elif not (sloppy or _is_dropped(name, equals)):
            raise UsageError(_complaint(name, word))
    return found


def _is_dropped(name: str, equals: str) -> bool:
    """Tell whether a word is somebody else's."""
    if name.lower().startswith("x-"):
        return True
    return name in (_DROPPED_WITH_VALUE if equals else _DROPPED)


def _complaint(name: str, word: str) -> str:
    """Say what is wrong with a word that fits no rule."""
    shown = printable(word)
    if name in _VALUES or name in _CHOICES or name in _BACKING or name == "backing_dir":
        return f"option {shown}: found no value, expected {name}=VALUE"
    if name in _FLAGS or name in KERNEL_WORDS:
        return f"option {shown}: found a value, expected {name} alone"
    return f"option {shown}: unknown"


def _consistent(options: MountOptions, *, explicit_rw: bool) -> MountOptions:
    """Refuse contradictions and draw the conclusions.

    Raises:
        UsageError: Two words exclude each other.
    """
    written = options.snapshot or options.overlay is not None
    writer = "snapshot" if options.snapshot else "overlay"
    reads_only = options.read_only or options.force_share
    contradictions = (
        (options.force_share and explicit_rw, "rw", "force_share"),
        (options.snapshot and options.overlay is not None, "snapshot", "overlay"),
        (written and options.force_share, writer, "force_share"),
        (written and options.read_only, "ro", writer),
        (options.compact == "full" and reads_only, "compact", "ro"),
        (options.growable and reads_only, "growable", "ro"),
        (options.truncate == "zero" and reads_only, "truncate=zero", "ro"),
        # The source is the overlay's base, and these two speak of bases.
        (written and options.backing.format is not None, "backing_format", writer),
        (written and options.backing.mode == "none", "backing=none", writer),
        (bool(options.backing.directories) and options.backing.mode != "confined",
         "backing_dir", f"backing={options.backing.mode}"),
    )  # fmt: skip
    for wrong, first, second in contradictions:
        if wrong:
            msg = f"options {first} and {second}: exclude each other"
            raise UsageError(msg)
    return replace(options, read_only=reads_only)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Read one of a few words."""
    if value not in choices:
        msg = f"option {name}: found {printable(value)}, expected {' or '.join(choices)}"
        raise UsageError(msg)
    return value


def _number(name: str, value: str, base: int, most: int, expected: str) -> int:
    """Read a whole number without a sign."""
    digits = "[0-7]{1,12}" if base == 8 else "[0-9]{1,12}"  # noqa: PLR2004  octal
    if not re.fullmatch(digits, value) or (number := int(value, base)) > most:
        msg = f"option {name}: found {printable(value)}, expected {expected}"
        raise UsageError(msg)
    return number


def _id(name: str, value: str) -> int:
    """Read a numeric user or group."""
    return _number(name, value, 10, _MAX_ID, f"a number up to {_MAX_ID}")


def _umask(name: str, value: str) -> int:
    """Read permission bits."""
    return _number(name, value, 8, 0o777, "octal permission bits up to 777")


def _seconds(name: str, value: str) -> float:
    """Read a time."""
    short_enough = re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", value)
    if not short_enough or not 0 < (seconds := float(value)) <= _MAX_SECONDS:
        found, most = printable(value), int(_MAX_SECONDS)
        msg = f"option {name}: found {found}, expected seconds, more than 0, up to {most}"
        raise UsageError(msg)
    return seconds


def _poll(name: str, value: str) -> float:
    """Read a number of microseconds, or that there is to be no polling."""
    if value == "off":
        return 0.0
    expected = f"microseconds up to {_MAX_POLL_MICROSECONDS}, or off"
    return _number(name, value, 10, _MAX_POLL_MICROSECONDS, expected) * 1e-6


def _readahead(name: str, value: str) -> Readahead:
    """Read how far to read ahead, or that it is up to the kernel."""
    if value == "kernel":
        return "kernel"
    size = _size(name, value)
    if size > _MAX_READAHEAD_BYTES:
        msg = f"option {name}: found {printable(value)}, expected at most 1G, or kernel"
        raise UsageError(msg)
    return size


def _size(name: str, value: str) -> int:
    """Read a number of bytes."""
    try:
        return parse_size(value)
    except UsageError as error:
        msg = f"option {name}: {error}"
        raise UsageError(msg) from error


def _cache(name: str, value: str) -> int:
    """Read a size of memory."""
    size = _size(name, value)
    if size < _MIN_CACHE_BYTES:
        msg = f"option {name}: found {printable(value)}, expected at least 64K"
        raise UsageError(msg)
    return size


def _path(_name: str, value: str) -> str:
    """Take a file name as it is."""
    return value


_FLAGS: Final[Mapping[str, Mapping[str, bool | str]]] = {
    "ro": {"read_only": True},
    "rw": {"read_only": False},
    "allow_other": {"allow_other": True},
    "allow_root": {"allow_root": True},
    "direct_io": {"direct_io": True},
    "force_share": {"force_share": True},
    "growable": {"growable": True},
    "discard": {"discard": True},
    "nodiscard": {"discard": False},
    "compact": {"compact": "full"},
    "snapshot": {"snapshot": True},
}
_CHOICES: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "compact": ("compact", ("auto", "off", "full")),
    "detect_zeroes": ("detect_zeroes", ("off", "on", "unmap")),
    "freelist": ("free_list", ("on", "off")),
    "truncate": ("truncate", ("refuse", "zero")),
}
_BACKING: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "backing": ("mode", ("confined", "any", "none")),
    "backing_format": ("format", ("raw", "qed")),
}
_VALUES: Final[Mapping[str, tuple[str, Callable[[str, str], Any]]]] = {
    "uid": ("uid", _id),
    "gid": ("gid", _id),
    "umask": ("umask", _umask),
    "commit": ("commit_seconds", _seconds),
    "compact_size": ("compact_bytes", _size),
    "compact_time": ("compact_seconds", _seconds),
    "cache_size": ("cache_bytes", _cache),
    "poll": ("poll_seconds", _poll),
    "readahead": ("readahead", _readahead),
    "overlay": ("overlay", _path),
}


def known_words() -> dict[str, tuple[str, ...] | None]:
    """Tell all words of our own and the kernel's: None for a word that stands alone.

    For a word with a value the tuple has what it can be, and is empty if that is no choice.
    """
    return {
        **dict.fromkeys((*_FLAGS, *KERNEL_WORDS)),
        **{word: choices for table in (_CHOICES, _BACKING) for word, (_, choices) in table.items()},
        **dict.fromkeys((*_VALUES, "backing_dir"), ()),
    }
