"""Mount options: which are accepted, dropped or refused, and the message of each refusal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qedfuse.disk.options import BackingPolicy
from qedfuse.errors import UsageError
from qedfuse.mount.images.naming import absolute_source
from qedfuse.mount.optionparser import known_options, parse_options
from qedfuse.mount.options import MountOptions
from qedfuse.mount.optionsyntax import (
    PATH_OPTIONS,
    absolute_options,
    escape_value,
    split_options,
)
from qedfuse.remote.address import parse_prefix
from qedfuse.remote.options import Deadlines, RemoteOptions

BAD_INPUT: Final = Path(__file__).parents[2] / "docs" / "bad-input.md"


def test_no_options_give_the_defaults() -> None:
    """No options, or empty ones, change nothing."""
    assert parse_options([]) == MountOptions()
    assert parse_options(["", ",,"]) == MountOptions()


def test_every_own_option() -> None:
    """Each option of qedfuse sets its attribute."""
    assert parse_options(
        [
            "allow_other,uid=1,gid=2,umask=027,direct_io,growable,commit=2.5,cache_size=64K",
            "backing=confined,backing_dir=/a,backing_dir=/b c,backing_format=raw",
        ]
    ) == MountOptions(
        allow_other=True,
        uid=1,
        gid=2,
        umask=0o27,
        direct_io=True,
        growable=True,
        commit_seconds=2.5,
        cache_bytes=65536,
        backing=BackingPolicy("confined", ("/a", "/b c"), "raw"),
    )
    assert parse_options(["allow_root,snapshot"]) == MountOptions(allow_root=True, snapshot=True)
    assert parse_options(["overlay=o.qed"]).overlay == "o.qed"
    assert parse_options(["nodiscard,detect_zeroes=unmap,freelist=on,compact"]) == MountOptions(
        discard=False, detect_zeroes="unmap", free_list="on", compact="full"
    )
    assert parse_options(["discard,detect_zeroes=off,freelist=off"]) == MountOptions(
        free_list="off"
    )


def test_options_for_servers() -> None:
    """Each option about servers sets its part of the options for remote files."""
    options = parse_options(
        [
            "backing_url=https://a.example/x,backing_url=s3://b,cache_dir=/c,remote_cache_size=1G",
            "remote_timeout=20,remote_attempt_timeout=3,allow_http,allow_unpinned,base_changed",
        ]
    )
    assert options.remote == RemoteOptions(
        cache_directory="/c",
        cache_bytes=1 << 30,
        deadlines=Deadlines(3, 3, 20),
        allow_http=True,
        allow_unpinned=True,
        allowed=(parse_prefix("https://a.example/x"), parse_prefix("s3://b")),
    )
    assert options.base_changed
    assert parse_options([]).remote == RemoteOptions()
    for text, deadlines in (
        ("remote_timeout=2", Deadlines(2, 2, 2)),
        ("remote_connect_timeout=0.5", Deadlines(0.5, 10, 60)),
        ("remote_connect_timeout=8", Deadlines(8, 10, 60)),
        ("remote_connect_timeout=30", Deadlines(10, 10, 60)),
        ("remote_connect_timeout=30,remote_attempt_timeout=20", Deadlines(20, 20, 60)),
    ):
        assert parse_options([text]).remote.deadlines == deadlines


def test_credentials_are_read_and_never_shown(tmp_path: Path) -> None:
    """The content of the file with credentials is in the options, but not in their text."""
    path = tmp_path / "secrets"
    path.write_text('# comment\n\nA_B1=hush\nC="x = y"\nD=\n')
    path.chmod(0o600)
    options = parse_options([f"credentials={path}"]).with_credentials()
    assert options.remote.credentials == (("A_B1", "hush"), ("C", "x = y"), ("D", ""))
    assert "hush" not in f"{options!r}{options.remote!r}"
    assert parse_options([]).with_credentials() == MountOptions()


def test_compaction_is_automatic_by_default() -> None:
    """``compact`` without a value is ``compact=full``; size and time limit ``compact=auto``."""
    assert parse_options([]).compact == "auto"
    assert parse_options(["compact"]) == parse_options(["compact=full"])
    assert parse_options(["compact", "compact=off"]).compact == "off"
    limited = parse_options(["compact_size=2M,compact_time=0.5"])
    assert (limited.compact_bytes, limited.compact_seconds) == (2 << 20, 0.5)
    assert parse_options(["ro,compact=auto"]).read_only


def test_read_ahead_is_a_size_or_the_kernels_own() -> None:
    """No read-ahead (0), the kernel's own and the default are three different values."""
    assert parse_options(["readahead=256K"]).readahead == 256 << 10
    assert parse_options(["readahead=0"]).readahead == 0
    assert parse_options(["readahead=kernel"]).readahead == "kernel"
    assert parse_options([]).readahead is None


def test_a_later_option_overrides_an_earlier_one() -> None:
    """The last of ro and rw is in effect, across several -o."""
    assert not parse_options(["ro", "rw"]).read_only
    assert parse_options(["rw", "ro"]).read_only
    assert parse_options(["uid=1", "uid=2"]).uid == 2
    assert parse_options(["nodiscard", "discard"]).discard


def test_force_share_is_read_only() -> None:
    """An image that another program may write to is opened read-only."""
    assert parse_options(["force_share"]).read_only


def test_options_for_other_programs_are_dropped_and_kernel_flags_kept() -> None:
    """Options of mount(8), systemd and libfuse are accepted; mount flags go to the kernel."""
    dropped = (
        "rw,dev,suid,exec,auto,noauto,user,nouser,users,nofail,_netdev,defaults,"
        "comment=a b,x-systemd.requires=/a,X-mount.mkdir,x-gvfs-show,fsname=a,subtype=b,"
        "max_read=131072,user=me,default_permissions,relatime,nodiratime,nosymfollow"
    )
    assert parse_options([dropped]) == MountOptions()
    kernel = "nosuid,nodev,noexec,noatime,sync,dirsync"
    assert parse_options([kernel, "noatime"]).kernel_flags == tuple(kernel.split(","))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frob", "option frob: unknown"),
        ("ro,read_olny", "option read_olny: unknown"),
        ("fro\nb=1", r"option fro\nb=1: unknown"),
        ("ro=1", "option ro=1: found a value, expected ro alone"),
        ("noatime=1", "option noatime=1: found a value, expected noatime alone"),
        ("discard=1", "option discard=1: found a value, expected discard alone"),
        ("detect_zeroes", "option detect_zeroes: found no value, expected detect_zeroes=VALUE"),
        ("detect_zeroes=yes", "option detect_zeroes: found yes, expected off or on or unmap"),
        ("freelist=keep", "option freelist: found keep, expected on or off"),
        ("ro,compact", "options compact=full and ro exclude each other"),
        ("force_share,compact=full", "options compact=full and force_share exclude each other"),
        ("compact=yes", "option compact: found yes, expected auto or off or full"),
        ("compact_size", "option compact_size: found no value, expected compact_size=VALUE"),
        (
            "compact_time=0",
            "option compact_time: found 0, expected seconds, more than 0, up to 3600",
        ),
        ("uid", "option uid: found no value, expected uid=VALUE"),
        ("uid=", "option uid=: found no value, expected uid=VALUE"),
        ("backing_dir", "option backing_dir: found no value, expected backing_dir=VALUE"),
        ("uid=root", "option uid: found root, expected a number up to 4294967294"),
        ("gid=4294967295", "option gid: found 4294967295, expected a number up to 4294967294"),
        ("gid=\u0661", "option gid: found \u0661, expected a number up to 4294967294"),
        ("umask=8", "option umask: found 8, expected octal permission bits up to 777"),
        ("umask=1000", "option umask: found 1000, expected octal permission bits up to 777"),
        ("commit=0", "option commit: found 0, expected seconds, more than 0, up to 3600"),
        ("commit=nan", "option commit: found nan, expected seconds, more than 0, up to 3600"),
        ("commit=3601", "option commit: found 3601, expected seconds, more than 0, up to 3600"),
        ("cache_size=1K", "option cache_size: found 1K, expected at least 64K"),
        ("readahead=2G", "option readahead: found 2G, expected at most 1G, or kernel"),
        ("readahead", "option readahead: found no value, expected readahead=VALUE"),
        ("backing=all", "option backing: found all, expected confined or any or none"),
        (
            "backing_format=ext4",
            (
                "option backing_format: found ext4, expected raw or qed or parallels or qcow or "
                "qcow2 or vdi or vhdx or vmdk or vpc"
            ),
        ),
        ("rw,force_share", "options rw and force_share exclude each other"),
        ("snapshot,overlay=a", "options snapshot and overlay exclude each other"),
        ("snapshot,ro", "options ro and snapshot exclude each other"),
        ("overlay=a,force_share", "options overlay and force_share exclude each other"),
        ("growable,ro", "options growable and ro exclude each other"),
        ("snapshot,backing=none", "options backing=none and snapshot exclude each other"),
        ("overlay=s3://a/b", "option overlay: found a URL, expected a path on this machine"),
        (
            "backing_dir=https://a/",
            (
                "option backing_dir: found a URL, expected a path on this machine (for URLs: "
                "backing_url)"
            ),
        ),
        (
            "backing_url=/srv",
            (
                "option backing_url: /srv: URL scheme: found no scheme, expected one of s3://, "
                "gs://, az://, https://, http://, nbd://, nbds://, nbd+unix://, nbds+unix://"
            ),
        ),
        ("remote_cache_size=1K", "option remote_cache_size: found 1K, expected at least 1M"),
        ("allow_http=yes", "option allow_http=yes: found a value, expected allow_http alone"),
        ("backing=any,backing_dir=/", "options backing_dir and backing=any exclude each other"),
    ],
)
def test_a_refusal_names_the_option(text: str, message: str) -> None:
    """The message names the option, what was found and what is expected."""
    with pytest.raises(UsageError) as caught:
        parse_options([text])
    assert str(caught.value) == message


def test_the_documented_refusals_name_all_schemes() -> None:
    """Each message of docs/bad-input.md about the scheme of a URL has the list that is printed."""
    with pytest.raises(UsageError) as caught:
        parse_options(["backing_url=images"])
    text = BAD_INPUT.read_text("utf-8")
    assert f"`{caught.value}`" in text
    schemes = str(caught.value).partition("expected ")[2]
    stated = re.findall(r"URL scheme: found [^,`]*, expected (one of [^`(]*[^`( ])", text)
    assert len(stated) == 3
    assert set(stated) == {schemes}


@pytest.mark.parametrize(
    "name", ["remote_timeout", "remote_attempt_timeout", "remote_connect_timeout"]
)
@pytest.mark.parametrize("value", ["0", "-1", "x", "86401", "1e3", "nan"])
def test_a_wrong_time_of_servers_is_refused(name: str, value: str) -> None:
    """A time that is not positive, too long or no number is refused, as the documentation says."""
    expected = f"option {name}: found {value}, expected seconds, more than 0, up to 86400"
    with pytest.raises(UsageError) as caught:
        parse_options([f"{name}={value}"])
    assert str(caught.value) == expected


def test_the_documented_time_of_servers_is_refused() -> None:
    """docs/bad-input.md has the message about a time for servers."""
    with pytest.raises(UsageError) as caught:
        parse_options(["remote_connect_timeout=0"])
    assert f"`{caught.value}` | 1 |" in BAD_INPUT.read_text("utf-8")


def test_a_wrong_size_names_the_option() -> None:
    """The message about a size begins with the name of the option."""
    for name in ("cache_size", "readahead"):
        with pytest.raises(UsageError, match=rf"^option {name}: size: found 'x'"):
            parse_options([f"{name}=x"])


def test_sloppy_drops_only_unknown_options() -> None:
    """Options with an unknown name are ignored; a known option in a wrong form is refused.

    A mount with ``ro=1`` must not become writable.
    """
    assert parse_options(["frob,ro"], sloppy=True) == MountOptions(read_only=True)
    for known in ("ro=1", "uid", "nosuid=yes", "backing_dir"):
        with pytest.raises(UsageError, match=r"found (a|no) value"):
            parse_options([known], sloppy=True)
    with pytest.raises(UsageError):
        parse_options(["rw,force_share"], sloppy=True)


def test_escapes() -> None:
    """An escaped comma belongs to the value; a backslash before any other character is kept."""
    assert split_options(r"overlay=a\,b,ro") == ["overlay=a,b", "ro"]
    assert split_options(r"a\\,b") == ["a\\", "b"]
    assert split_options(r"a\x,b" + "\\") == [r"a\x", "b\\"]


@given(st.lists(st.text(min_size=1), max_size=5))
def test_escaping_is_reversible(options: list[str]) -> None:
    """Any text is unchanged after escaping and splitting."""
    assert split_options(",".join(map(escape_value, options))) == options


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """No text makes the parser fail with another exception, and every refusal is one line."""
    try:
        parse_options([text])
    except UsageError as error:
        assert str(error).isprintable()  # noqa: PT017  not every text is refused


@pytest.mark.parametrize("name", [name for name, values in known_options().items() if values == ()])
def test_the_table_of_paths_has_each_option_that_refuses_a_url(name: str) -> None:
    """The completions and the absolute paths come from the table, the refusal from the parser."""
    message = ""
    try:
        parse_options([f"{name}=https://server/file"])
    except UsageError as error:
        message = str(error)
    assert ("expected a path on this machine" in message) == (name in PATH_OPTIONS)


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are resolved before the serving process changes its working directory."""
    monkeypatch.chdir("/usr")
    options = parse_options(
        ["overlay=o.qed,backing_dir=../etc,backing_dir=/x,cache_dir=c,credentials=s"]
    ).absolute()
    assert options.overlay == "/usr/o.qed"
    assert options.backing.directories == ("/usr/../etc", "/x")
    assert options.remote.cache_directory == "/usr/c"
    assert options.credentials_file == "/usr/s"


def test_an_absolute_path_leads_to_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``..`` after a symbolic link leads to the parent of the link's target, as in the kernel."""
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/inner")
    for directory in (tmp_path, tmp_path / "far"):
        (directory / "x").touch()
    monkeypatch.chdir(tmp_path)
    named = "link/../x"
    text = f"overlay={named},backing_dir={named},cache_dir={named},credentials={named}"
    text += f",metrics=unix:{named}"
    options = parse_options([text]).absolute()
    assert options.metrics is not None
    found = [absolute_source(named), options.overlay, *options.backing.directories]
    found += [options.remote.cache_directory, options.credentials_file, options.metrics.path]
    found += [option.partition("=")[2].removeprefix("unix:") for option in absolute_options([text])]
    assert len(found) == 11
    for path in found:
        assert path is not None
        assert path.startswith("/")
        assert Path(path).samefile(tmp_path / "far" / "x")
