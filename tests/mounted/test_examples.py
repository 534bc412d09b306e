"""The examples do what they say, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import qemu
from tests.support.sandbox import ROOT, run_in_sandbox
from tests.support.users import as_user, user_directory

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES: Final = ROOT / "examples"
TIMEOUT: Final = 200.0

SHOWN: Final = {
    "golden-image.sh": ("web: release 2", "mail: release 1", "golden-2.qed: sound"),
    "recover-files.sh": ("L1 entry 32767", "numbers.txt", "vm.qed.before-repair", "vm.qed: sound"),
    "from-qcow2.sh": ("No errors were found", "It was a QED image for a while."),
}
"""For each script, texts that its output contains if it succeeded."""


_INSTALLED: Final = f"""
{EXAMPLES}/install.sh --link "$1" 2>/dev/null
"""


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Give a disk with ext4 on its first partition, at sector 2048, and FAT on the second."""
    tree = tmp_path / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/hostname").write_text("guest\n", encoding="utf-8")
    disk, fat = tmp_path / "disk.raw", tmp_path / "fat.raw"
    run_in_sandbox(
        """
        truncate --size 64M "$1"
        echo 'label: gpt
        start=2048, size=65536
        start=67584, size=32768' | sfdisk --quiet "$1"
        mkfs.ext4 -q -d "$2" -E offset=1048576 "$1" 32M
        truncate --size 16M "$3"
        mkfs.fat "$3"
        mmd -i "$3" ::/boot
        mcopy -i "$3" "$2/etc/hostname" "::/boot/a long name.txt"
        dd if="$3" of="$1" bs=1M seek=33 conv=notrunc status=none
        """,
        disk,
        tree,
        fat,
    )
    return disk


@pytest.fixture
def image(tmp_path: Path, raw: Path) -> Path:
    """Give an image of that disk."""
    path = tmp_path / "vm.qed"
    qemu.convert(raw, path, source_format="raw", target_format="qed")
    return path


def test_every_script_is_run() -> None:
    """Each script of the examples has an expected output here or a test of its own."""
    others = {
        "copy-from-partitions.sh",
        "golden-image-in-a-bucket.sh",
        "install.sh",
        "quickstart.sh",
        "setup.sh",
        "scratch.sh",
    }
    assert {path.name for path in EXAMPLES.glob("*.sh")} == {*SHOWN, *others}


@pytest.mark.parametrize("script", SHOWN)
def test_script(script: str, installation: Path) -> None:
    """A script prints what it promises, and its directory is empty afterwards."""
    shown = run_in_sandbox(
        f"""
        {_INSTALLED}
        mkdir /srv/scratch
        {EXAMPLES}/{script} /srv/scratch
        ! findmnt --types fuse.qedfuse
        test -z "$(ls -A /srv/scratch)"
        """,
        installation,
    )
    assert [text for text in SHOWN[script] if text not in shown] == [], shown


@pytest.mark.parametrize("script", SHOWN)
def test_script_help_is_its_header(script: str) -> None:
    """The help of a script is its header, with its usage."""
    done = subprocess.run([EXAMPLES / script, "--help"], capture_output=True, text=True, check=True)
    assert f"examples/{script} [DIRECTORY]" in done.stdout


def test_an_ordinary_user_copies_files_from_partitions(installation: Path) -> None:
    """Without root, files come out of FAT, NTFS, ext4 and btrfs partitions, logical ones too."""
    with user_directory() as home:
        done = as_user(
            EXAMPLES / "copy-from-partitions.sh",
            home,
            variables={"PATH": f"{installation / 'bin'}:{os.environ['PATH']}", "HOME": str(home)},
        )
        assert done.returncode == 0, done.stderr
        assert [path.name for path in home.iterdir()] == ["mnt"]
    names = [line.split()[-1] for line in done.stdout.splitlines() if ".raw" in line]
    windows = ["windows.raw", "windows.raw.p1", "windows.raw.p2"]
    assert names == [*windows, "linux.raw", "linux.raw.p1", "linux.raw.p5", "linux.raw.p6"]
    for kind in ("fat", "ntfs", "ext4", "btrfs"):
        assert f"== {kind}: The only copy of a letter.\n" in done.stderr


def test_interrupt_cleans_up(installation: Path, tmp_path: Path) -> None:
    """An interrupt while a disk is mounted unmounts it and removes all files."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    # A program that is found before the real one stops the script at the right moment.
    stop = tmp_path / "stop"
    stop.mkdir()
    (stop / "debugfs").write_text("#!/bin/sh\nkill -INT $PPID\nexit 1\n", encoding="utf-8")
    (stop / "debugfs").chmod(0o755)
    done = subprocess.run(
        [EXAMPLES / "recover-files.sh", scratch],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env={**os.environ, "PATH": f"{stop}:{installation / 'bin'}:{os.environ['PATH']}"},
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "the files are copied out" in done.stderr
    assert list(scratch.iterdir()) == []


def test_list_files(image: Path) -> None:
    """Partitions and the files of both file systems are listed."""
    shown = list_files(image)
    assert shown.returncode == 0, shown.stderr
    assert "partition 1 at 1048576, Linux filesystem data: ext2/3/4\n" in shown.stdout
    assert "  /etc/\n" in shown.stdout
    assert "           6  /etc/hostname\n" in shown.stdout
    assert "partition 2 at 34603008, Linux filesystem data: FAT\n" in shown.stdout
    assert "           6  /BOOT/a long name.txt\n" in shown.stdout


def test_list_files_without_partitions(tmp_path: Path, raw: Path) -> None:
    """A file system that takes the whole disk is listed, also through an overlay."""
    base, overlay = tmp_path / "fat.raw", tmp_path / "overlay.qed"
    qemu.create(overlay, base.stat().st_size, backing=base, backing_format="raw")
    shown = list_files(overlay)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("disk: FAT\n")
    assert raw.exists()


def test_list_files_of_no_image(raw: Path) -> None:
    """A file that is no QED image gets one line."""
    shown = list_files(raw)
    assert shown.returncode == 1
    assert shown.stderr.startswith(f"list_files.py: {raw}: not a QED image")
    assert shown.stderr.count("\n") == 1


def list_files(image: Path) -> subprocess.CompletedProcess[str]:
    """Run the example."""
    return subprocess.run(
        [sys.executable, EXAMPLES / "list_files.py", image],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_fstab_lines(installation: Path, image: Path) -> None:
    """mount(8) mounts each line of the example fstab, and the guest's files are there."""
    shown = run_in_sandbox(
        f"""
        {_INSTALLED}
        cp "$2" /srv/images/vm.qed
        cp "$2" /srv/images/golden.qed
        mkdir /mnt/vm /mnt/root /mnt/golden
        findmnt --verify --tab-file {EXAMPLES}/fstab
        mount --fstab {EXAMPLES}/fstab /mnt/vm
        mount --fstab {EXAMPLES}/fstab /mnt/root
        mount --fstab {EXAMPLES}/fstab /mnt/golden
        echo "the guest is called $(cat /mnt/root/etc/hostname)"
        cmp /mnt/vm/vm.raw /mnt/golden/golden.raw || echo 'one of them is written to'
        stat --format 'permissions: %a' /mnt/golden/golden.raw
        umount /mnt/root
        qedfuse umount /mnt/vm
        qedfuse umount /mnt/golden
        """,
        installation,
        image,
    )
    assert "the guest is called guest" in shown
    assert "one of them is written to" in shown
    assert "permissions: 444" in shown


def test_units_pass_systemd_analyze(installation: Path) -> None:
    """systemd-analyze verify finds nothing wrong with the units."""
    shown = run_in_sandbox(
        f"""
        {_INSTALLED}
        mkdir /srv/units
        cp {EXAMPLES}/systemd/* /srv/units
        SYSTEMD_UNIT_PATH=/srv/units: systemd-analyze verify --man=no /srv/units/*
        """,
        installation,
    )
    assert shown == ""


def read_unit(name: str) -> dict[str, str]:
    """Read a unit file, in which no key occurs twice."""
    lines = (EXAMPLES / "systemd" / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.partition("=") for line in lines if "=" in line and not line.startswith("#")]
    return {key: value for key, _, value in pairs}


@pytest.mark.parametrize(
    "unit",
    [
        "packaging/qedfuse@.service",
        "examples/systemd/qedfuse-vm.service",
        "examples/systemd/mnt-vm.mount",
    ],
)
def test_no_unit_lets_a_stop_kill_the_server(unit: str) -> None:
    """The last signal of a stop is a second SIGTERM, after which everything is made durable."""
    lines = (ROOT / unit).read_text(encoding="utf-8").splitlines()
    assert "FinalKillSignal=SIGTERM" in lines
    # Without a limit of its own a stop would end with that signal after 90 seconds.
    assert {"TimeoutStopSec=10min", "TimeoutSec=10min"} & set(lines)
    # The first signal must not end a helper while the server goes on.  A mount unit has no main
    # process to which the first signal could go alone.
    assert ("KillMode=mixed" in lines) == unit.endswith(".service")


def test_mount_units_do_what_the_fstab_does(installation: Path, image: Path) -> None:
    """mount(8), run as systemd runs it for the mount units, mounts the disk and its file system."""
    commands = []
    for name in ("mnt-vm.mount", "mnt-root.mount"):
        mount = read_unit(name)
        assert name == mount["Where"].strip("/").replace("/", "-") + ".mount"
        options = f"-o {mount['Options']}" if "Options" in mount else ""
        commands.append(f"mount {mount['What']} {mount['Where']} -t {mount['Type']} {options}")
    shown = run_in_sandbox(
        f"""
        {_INSTALLED}
        cp "$2" /srv/images
        mkdir /mnt/vm /mnt/root
        {commands[0]}
        {commands[1]}
        cat /mnt/root/etc/hostname
        umount /mnt/root
        qedfuse umount /mnt/vm
        """,
        installation,
        image,
    )
    assert shown == "guest\n"


def test_service_starts_and_stops(installation: Path, image: Path) -> None:
    """The service notifies systemd when the disk is ready, and exits with 0 when stopped."""
    service = read_unit("qedfuse-vm.service")
    assert service["Type"] == "notify"
    shown = run_in_sandbox(
        f"""
        {_INSTALLED}
        cp "$2" /srv/images
        mkdir /mnt/vm
        cat >/srv/manager.py <<'END'
import os, socket, subprocess, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
    notices.bind("/srv/notify")
    notices.settimeout({TIMEOUT})
    service = subprocess.Popen(sys.argv[1], shell=True, env=os.environ | {{
        "NOTIFY_SOCKET": "/srv/notify"}})
    while b"READY=1" not in notices.recv(4096):
        pass
    print(os.listdir("/mnt/vm"))
    print("stopped", subprocess.run(sys.argv[2], shell=True).returncode)
    print("ended", service.wait({TIMEOUT}))
END
        {sys.executable} /srv/manager.py '{service["ExecStart"]}' '{service["ExecStop"]}'
        """,
        installation,
        image,
    )
    # The service logs to the same output: without CAP_SYS_RESOURCE that it is not protected.
    lines = [line for line in shown.splitlines() if not line.startswith("qedfuse: /mnt/vm: ")]
    assert lines == ["['vm.raw']", "stopped 0", "ended 0"]
