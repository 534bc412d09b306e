"""The parts of a sandbox that cannot be put into force are listed once, each with its reason."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, NoReturn

import pytest

from qedfuse.mount.options import MountOptions
from qedfuse.mount.sandbox import sandbox as module
from qedfuse.mount.sandbox import seccomp
from qedfuse.mount.sandbox.allowedfiles import key_directories
from qedfuse.mount.sandbox.needs import ServerNeeds, server_needs
from qedfuse.mount.sandbox.privileges import removing_needs_override
from qedfuse.mount.sandbox.sandbox import Sandbox
from qedfuse.util.landlock import landlock_version
from tests.support.extensions import needs_extensions

if TYPE_CHECKING:
    from pathlib import Path

    from qedfuse.util.landlock import Ruleset

REFUSED = "the kernel or a filter of system calls refuses it"


def landlock_lines(sandbox: Sandbox) -> list[str]:
    """Return the missing parts but seccomp, whose library may be missing."""
    return [part for part in sandbox.missing if not part.startswith("seccomp")]


def refuse(_rules: Ruleset | None, _capabilities: int) -> NoReturn:
    """Fail as if the kernel refused."""
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("version", [0, 1, landlock_version()])
def test_a_missing_extension_is_listed_once(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension, the version of Landlock makes no difference."""
    monkeypatch.setattr(module, "landlock_version", lambda: version)
    monkeypatch.setitem(sys.modules, "qedfuse.mount.sandbox._threads", None)
    sandbox = Sandbox("on", ServerNeeds("/mnt", is_directory=True))
    assert landlock_lines(sandbox) == ["Landlock (the extension was not built, or cannot be used)"]


@needs_extensions
@pytest.mark.parametrize(("version", "reason"), [(0, REFUSED), (1, "found version 1, expected 2")])
def test_landlock_is_listed_once(
    version: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the threads cannot be restricted either, another part is listed for that."""
    monkeypatch.setattr(module, "landlock_version", lambda: version)
    sandbox = Sandbox("on", ServerNeeds("/mnt", is_directory=True))
    assert landlock_lines(sandbox) == [f"Landlock ({reason})"]
    sandbox._restrict = refuse
    assert sandbox._restrict_threads() == []
    assert landlock_lines(sandbox) == [
        f"Landlock ({reason})",
        "no new privileges (Operation not permitted)",
    ]


@needs_extensions
@pytest.mark.skipif(landlock_version() < 2, reason="needs Landlock")
def test_the_ruleset_is_closed_after_a_failure() -> None:
    """If the kernel refuses to restrict the threads, the descriptor does not stay open."""
    sandbox = Sandbox("on", ServerNeeds("/mnt", is_directory=True))
    assert sandbox._rules is not None
    descriptor = sandbox._rules.fd
    os.fstat(descriptor)
    sandbox._restrict = refuse
    assert sandbox._restrict_threads() == []
    assert landlock_lines(sandbox) == ["Landlock (Operation not permitted)"]
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(descriptor)


@pytest.mark.parametrize(
    ("home", "option", "expected"),
    [
        ("nowhere", None, None),
        ("/home/user", None, "/home/user/.cache/qedfuse"),
        ("nowhere", "/cache", "/cache"),
    ],
)
def test_a_user_without_a_home_directory_has_no_cache(
    home: str, option: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount of an image on a server is not refused because there is no default directory."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    needs = server_needs(
        "/mnt",
        ["https://example.org/vm.qed"],
        MountOptions(remote_cache_directory=option),
        is_directory=True,
        mode=0o600,
        uses_servers=True,
        socket_directory=None,
    )
    assert needs.cache_directory == expected


@pytest.mark.parametrize(
    "name",
    [
        "AZURE_IDENTITY_ENDPOINT",
        "IDENTITY_ENDPOINT",
        "GCE_METADATA_HOST",
        "AZURITE_BLOB_STORAGE_URL",
    ],
)
def test_the_port_of_a_service_is_permitted(name: str) -> None:
    """A server may connect to the port of each address that obstore reads from a variable."""
    assert 41111 in module._ports((), [(name, "http://127.0.0.1:41111/msi")])


def test_the_directory_of_each_link_to_a_key_may_be_read(tmp_path: Path) -> None:
    """A key is found again whichever of the links that lead to it is replaced."""
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    (tmp_path / "first/key").symlink_to("../second/key")
    (tmp_path / "second/key").symlink_to(tmp_path / "third/key")
    found = [path for path, _rights in key_directories([str(tmp_path / "first/key")])]
    assert [os.path.realpath(path) for path in found] == [
        str(tmp_path / name) for name in ("first", "second", "third")
    ]
    # A loop of links, which the kernel refuses to follow.
    (tmp_path / "third/key").symlink_to(tmp_path / "first/key")
    assert len(list(key_directories([str(tmp_path / "first/key")]))) == 40, "endless"


@pytest.mark.parametrize(
    ("mode", "needed"), [(0o700, False), (0o300, False), (0o500, True), (0o600, True)]
)
def test_removing_a_file_from_an_own_directory(tmp_path: Path, mode: int, *, needed: bool) -> None:
    """The owner of a directory needs no capability if the mode lets it write and search."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        os.fchmod(fd, mode)
        assert removing_needs_override(fd) is needed
    finally:
        os.fchmod(fd, 0o700)
        os.close(fd)


@pytest.mark.parametrize(("machine", "argument"), [("x86_64", 0), ("aarch64", 0), ("s390x", 1)])
def test_the_flags_of_clone(machine: str, argument: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter tests the argument of clone(2) that has the flags on the architecture."""
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("", "", "", "", machine)))
    needs = seccomp.CallNeeds(network=False, host=False, kill=False, modes=(), log=False)
    (conditions,) = [found for name, _, found in seccomp._rules(needs) if name == "clone"]
    assert [condition.arg for condition in conditions] == [argument]
