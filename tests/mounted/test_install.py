"""examples/install.sh: mount(8) and the shells find what it installs, and it uninstalls cleanly."""

from __future__ import annotations

import importlib
import os
import tomllib
from typing import TYPE_CHECKING

import pytest

from tests.support import qemu
from tests.support.sandbox import ROOT, run_in_sandbox

if TYPE_CHECKING:
    from pathlib import Path

ODD_NAMES = [
    "bücher.qed",
    "a b,c#d\ttab\nnewline\\\\134.qed",
    "\u2028\x85\x0c\x0b\x1c\r" + os.fsdecode(b"\xfc, \\\xfc.qed"),
]
"""Names of images that mount(8), libfuse or Python could take for something else."""

INSTALL = f"{ROOT}/examples/install.sh"


@pytest.mark.parametrize("fstype", ["fuse.qedfuse", "qedfuse"])
def test_mount_finds_the_helper(installation: Path, tmp_path: Path, fstype: str) -> None:
    """mount(8) mounts both types after the installation; findmnt shows source and type."""
    image = qemu.create(tmp_path / "vm.qed", 1 << 20)
    shown = run_in_sandbox(
        f"""
        {INSTALL} --link "$1" >&2
        mount -t {fstype} -o ro,noexec "$2" /mnt
        test "$(wc -c </mnt/vm.raw)" = 1048576
        findmnt --noheadings --output SOURCE,FSTYPE /mnt
        qedfuse umount /mnt
        """,
        installation,
        image,
    )
    assert f"{image} fuse.qedfuse" in " ".join(shown.split())


@pytest.mark.parametrize("name", ODD_NAMES)
def test_fstab_finds_the_mount_of_any_name(installation: Path, tmp_path: Path, name: str) -> None:
    """An image of any name is mounted once by two mount -a, and umount(8) finds it in two ways."""
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
        installation,
        image,
    )
    if name.isprintable():
        assert shown.split("\n")[-3:-1] == [str(image)] * 2


def test_mount_passes_on_the_error(installation: Path, tmp_path: Path) -> None:
    """mount(8) passes on the command's message and exit code."""
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
        installation,
        image,
    )
    assert f"qedfuse: {image}: " in shown
    assert "code 12\n" in shown


def test_uninstall_removes_exactly_what_was_installed(installation: Path) -> None:
    """Uninstalling leaves the system as it was; installing or uninstalling twice is harmless."""
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
        installation,
    )


def test_man_pages_and_completions_are_found(installation: Path) -> None:
    """The man pages are installed, and each shell finds the completion of both programs."""
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
        installation,
    )
    assert "qedimg - create, inspect" in shown
    assert "qedfuse - show QED disk images" in shown
    assert "complete -F _qedimg qedimg" in shown
    assert "_qedfuse _qedimg" in shown
    assert "check\tfind damage" in shown


def test_a_foreign_file_is_not_replaced(installation: Path) -> None:
    """The installation refuses, with one line, to replace a program that it did not install."""
    shown = run_in_sandbox(
        f"""
        echo theirs >/sbin/mount.qedfuse
        ! {INSTALL} --link "$1"
        test "$(cat /sbin/mount.qedfuse)" = theirs
        test ! -e /usr/local/bin/qedfuse
        """,
        installation,
    )
    assert shown.startswith("install.sh: /sbin/mount.qedfuse: found a file of another program")


def test_links_of_the_debian_package_are_not_ours(installation: Path) -> None:
    """The helpers of an installed Debian package are neither replaced nor removed."""
    shown = run_in_sandbox(
        f"""
        ln -s ../bin/qedfuse /usr/sbin/mount.qedfuse
        ! {INSTALL} --link "$1"
        {INSTALL} --uninstall
        readlink /usr/sbin/mount.qedfuse
        """,
        installation,
    )
    assert "/sbin/mount.qedfuse: found a file of another program" in shown
    assert shown.endswith("../bin/qedfuse\n")


def test_console_script_targets_exist() -> None:
    """Each console script of pyproject.toml names a function that can be imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"]
    for target in project["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
