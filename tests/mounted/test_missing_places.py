"""Commands in a removed working directory, and on a system without /proc."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.support.sandbox import run_in_sandbox

if TYPE_CHECKING:
    from pathlib import Path

PREPARE: Final = """
    PATH=$1/bin:$PATH
    mkdir /srv/m /srv/gone
    image=/srv/images/a.qed
    qedimg create -q "$image" 1M
    fails() {
        code=0
        "${@:2}" 2>&1 || code=$?
        test "$code" = "$1" || { echo "$*: exit code $code"; exit 1; }
    }
"""
REMOVED: Final = "the working directory has been removed: expected absolute names"


def test_a_removed_working_directory(installation: Path) -> None:
    """In a removed directory, absolute names work and a relative one gets a line that says why."""
    script = """
        cd /srv/gone
        rmdir /srv/gone
        qedfuse "$image" /srv/m -o overlay=/srv/images/top.qed --pidfile /srv/images/pid
        ls /srv/m
        qedfuse umount /srv/m
        qedimg create -q -b a.qed /srv/images/b.qed
        fails 2 qedfuse "$image" m
        fails 2 qedfuse a.qed /srv/m
        fails 2 qedfuse -f "$image" /srv/m -o overlay=top.qed
        fails 2 qedfuse umount m
        fails 1 qedimg info a.qed
        fails 1 qedimg create -b "$image" b.qed
        if findmnt /srv/m; then exit 1; fi
    """
    lines = run_in_sandbox(PREPARE + script, installation).splitlines()
    assert lines[0] == "a.raw"
    assert lines[1:5] == [f"qedfuse: {REMOVED}"] * 4
    assert lines[5] == f"qedimg: a.qed: cannot open: No such file or directory ({REMOVED})"
    assert lines[6:] == [f"qedimg: {REMOVED}"]


def test_a_system_without_proc(installation: Path) -> None:
    """Without /proc each command prints one line that says so, and fails."""
    script = """
        mount -t tmpfs sandbox /proc
        fails 2 qedfuse "$image" /srv/m
        fails 2 qedfuse -f "$image" /srv/m
        fails 2 qedfuse umount /srv/m
        fails 1 qedimg info "$image"
    """
    missing = "/proc: found no proc file system, expected one (as root: mount -t proc proc /proc)"
    lines = run_in_sandbox(PREPARE + script, installation).splitlines()
    assert lines == [f"qedfuse: {missing}"] * 3 + [f"qedimg: {missing}"]
