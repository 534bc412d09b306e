"""examples/install.sh puts the commands where mount(8) finds them, and takes them away again."""

from __future__ import annotations

import importlib
import os
import tomllib
from typing import TYPE_CHECKING

import pytest

from tests.support import qemu
from tests.support.sandbox import ROOT, make_environment, run_in_sandbox

if TYPE_CHECKING:
    from pathlib import Path

ODD_NAMES = [
    "bücher.qed",
    "a b,c#d\ttab\nnewline\\\\134.qed",
    "\u2028\x85\x0c\x0b\x1c\r" + os.fsdecode(b"\xfc, \\\xfc.qed"),
]
"""Names of images that mount(8), libfuse or Python could take for something else."""

INSTALL = f"{ROOT}/examples/install.sh"


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Give something to link to."""
    return make_environment(tmp_path / "environment")


@pytest.mark.parametrize("fstype", ["fuse.qedfuse", "qedfuse"])
def test_mount_finds_the_helper(environment: Path, tmp_path: Path, fstype: str) -> None:
    """After the installation mount(8) mounts both types, and findmnt shows source and type."""
    image = qemu.create(tmp_path / "vm.qed", 1 << 20)
    shown = run_in_sandbox(
        f"""
        {INSTALL} --link "$1" >&2
        mount -t {fstype} -o ro,noexec "$2" /mnt
        test "$(wc -c </mnt/vm.raw)" = 1048576
        findmnt --noheadings --output SOURCE,FSTYPE /mnt
        qedfuse umount /mnt
        """,
        environment,
        image,
    )
    assert f"{image} fuse.qedfuse" in " ".join(shown.split())


@pytest.mark.parametrize("name", ODD_NAMES)
def test_fstab_knows_an_image_by_its_name(environment: Path, tmp_path: Path, name: str) -> None:
    """With any name: mount -a twice mounts once, and both ways of umount(8) find the mount."""
    image = qemu.create(tmp_path / "vm.qed", 1 << 20).rename(tmp_path / name)
    shown = run_in_sandbox(
        f"""
        {INSTALL} --link "$1" >&2
        escaped=$(printf %s. "$2" | sed -z 's/\\\\/\\\\134/g; s/ /\\\\040/g; s/\\t/\\\\011/g;
            s/\\n/\\\\012/g; s/#/\\\\043/g')
        printf '%s /mnt fuse.qedfuse ro 0 0\\n' "${{escaped%.}}" >/run/fstab
        for by in "$2" /mnt; do
            mount -a -T /run/fstab
            mount -a -T /run/fstab
            test "$(grep -c ' /mnt .* - fuse.qedfuse ' /proc/self/mountinfo)" = 1
            test "$(wc -c </mnt/*.raw)" = 1048576
            LC_ALL=C.UTF-8 findmnt --noheadings --output SOURCE --types fuse.qedfuse /mnt
            umount "$by"
            ! grep ' /mnt .* - fuse.qedfuse ' /proc/self/mountinfo
        done
        """,
        environment,
        image,
    )
    if name.isprintable():
        assert shown.split("\n")[-3:-1] == [str(image)] * 2


def test_a_mount_that_fails_is_a_failed_mount(environment: Path, tmp_path: Path) -> None:
    """mount(8) passes on our line and our exit code."""
    image = tmp_path / "vm.qed"
    image.write_bytes(b"not an image" * 100)
    shown = run_in_sandbox(
        f"""
        {INSTALL} --link "$1" >&2
        code=0
        mount -t fuse.qedfuse "$2" /mnt || code=$?
        echo "code $code"
        ! findmnt /mnt --types fuse.qedfuse
        """,
        environment,
        image,
    )
    assert f"qedfuse: {image}: " in shown
    assert "code 12\n" in shown


def test_uninstall_takes_away_what_was_installed(environment: Path) -> None:
    """Nothing is left, and what is not ours stays; both can be said twice."""
    run_in_sandbox(
        f"""
        listed() {{ ls -l /usr/sbin /usr/local/bin; find /usr/local/share ! -type d; }}
        before=$(listed)
        {INSTALL} --link "$1"
        {INSTALL} --link "$1"
        qedfuse --version
        mkdir /opt/qedfuse
        {INSTALL} --uninstall
        {INSTALL} --uninstall
        test -d /opt/qedfuse
        test -x "$1/bin/qedfuse"
        test "$before" = "$(listed)"
        """,
        environment,
    )


def test_pages_and_completions_are_where_they_are_looked_for(environment: Path) -> None:
    """The man pages are found, and each shell finds the completion of both programs."""
    shown = run_in_sandbox(
        f"""
        {INSTALL} --link "$1" >&2
        unset MANPATH
        cd /usr/local/share
        for page in man/man1/qedimg.1 man/man8/qedfuse.8; do
            groff -man -Tascii -P-cbou "$page" | grep -A 1 NAME
        done
        bash -c '. bash-completion/completions/qedimg; complete -p qedimg'
        zsh -fc 'autoload -Uz compinit; compinit -u -D; echo "$_comps[qedfuse] $_comps[qedimg]"'
        fish --no-config -c 'source fish/vendor_completions.d/qedimg.fish; complete -C"qedimg ch"'
        """,
        environment,
    )
    assert "qedimg - make, inspect" in shown
    assert "qedfuse - show QED disk images" in shown
    assert "complete -F _qedimg qedimg" in shown
    assert "_qedfuse _qedimg" in shown
    assert "check\tlook for damage" in shown


def test_files_of_others_are_not_replaced(environment: Path) -> None:
    """A program of that name that somebody else installed is left alone, with one line."""
    shown = run_in_sandbox(
        f"""
        echo theirs >/sbin/mount.qedfuse
        ! {INSTALL} --link "$1"
        test "$(cat /sbin/mount.qedfuse)" = theirs
        test ! -e /usr/local/bin/qedfuse
        """,
        environment,
    )
    assert shown.startswith("install.sh: /sbin/mount.qedfuse: found a file that is not ours")


def test_the_console_script_exists() -> None:
    """What pip makes a command of can be imported and called."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"]
    for target in project["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
