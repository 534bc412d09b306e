"""Inherited file descriptors: standard ones that are closed, locks and pipes of the caller."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import qemu
from tests.support.mounted import COMMAND, TIMEOUT, clean_up, is_mounted, without_notice
from tests.support.programs import environment

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES: Final = 4 << 20
CLOSINGS: Final = [" ".join(words) for words in product(*(("", f"{n}>&-") for n in range(3)))]
"""Redirections of a shell that close some of the three standard descriptors."""

SHOW: Final = """
import os
from qedfuse.cli.streams import open_streams
open_streams()
assert [os.get_inheritable(number) for number in range(3)] == [True] * 3
os.open("/dev/null", os.O_RDONLY)
report = os.open(os.environ["REPORT"], os.O_WRONLY)
os.write(report, b"%d" % report)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Give an image whose first cluster is filled with 7."""
    path = qemu.create(tmp_path / "vm.qed", DISK_BYTES)
    qemu.io(path, "write -P 7 0 64k")
    return path


def start(script: str, *words: str | Path, **variables: str) -> subprocess.Popen[str]:
    """Start a shell script with arguments."""
    return subprocess.Popen(
        ["bash", "-c", script, "bash", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment(), **variables},
    )


def succeed(process: subprocess.Popen[str]) -> str:
    """Wait for a script that must succeed; give what it printed."""
    try:
        printed, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0, printed
    return without_notice(printed)


def test_standard_descriptors_are_never_reused(tmp_path: Path) -> None:
    """Whichever standard descriptors are closed at the start, the next opened file is above 2."""
    reports = [tmp_path / f"report{number}" for number in range(len(CLOSINGS))]
    running = []
    for closing, report in zip(CLOSINGS, reports, strict=True):
        report.touch()
        script = f'"$@" {closing}'
        running.append(start(script, sys.executable, "-c", SHOW, REPORT=str(report)))
    for process in running:
        succeed(process)
    assert all(int(report.read_text()) > 3 for report in reports)


def test_mounts_work_with_closed_standard_descriptors(tmp_path: Path) -> None:
    """Mounting and unmounting work with any combination of closed standard descriptors."""
    script = """
        set -e
        mkdir "$1"
        qemu-img create -q -f qed "$1.qed" 4M
        "${@:2}" "$1.qed" "$1" CLOSING
        dd if=/dev/urandom of="$1.data" bs=64k count=4 status=none
        dd if="$1.data" of="$1/$(ls "$1")" bs=64k conv=notrunc,fsync status=none
        df "$1" >/dev/null
        "${@:2}" umount "$1" CLOSING
        test -z "$(ls -A "$1")"
        head -c 262144 "$1.data" | cmp - <(qemu-img dd -f qed -O raw if="$1.qed" \\
            of="$1.back" bs=64k count=4 && cat "$1.back")
    """
    running = []
    try:
        for number, closing in enumerate(CLOSINGS):
            text = script.replace("CLOSING", closing)
            running.append(start(text, tmp_path / str(number), *COMMAND))
        for process in running:
            assert succeed(process) == ""
    finally:
        for number in range(len(CLOSINGS)):
            clean_up(tmp_path / str(number))


def test_a_mount_in_front_with_closed_standard_descriptors(image: Path, mnt: Path) -> None:
    """A mount in the foreground without standard descriptors serves until SIGTERM ends it."""
    script = """
        set -e
        mkfifo "$2.ready"
        "${@:3}" -f --pidfile "$2.ready" "$1" "$2" <&- >&- 2>&- &
        read -r pid <"$2.ready"
        dd if="$2/vm.raw" bs=64k count=1 status=none | tr -d '\\007' | wc -c
        kill "$pid"
        wait "$!"
    """
    assert succeed(start(script, image, mnt, *COMMAND)) == "0\n"
    assert not is_mounted(mnt)


def test_qedimg_with_closed_standard_descriptors(image: Path) -> None:
    """A qedimg command that prints nothing succeeds; one whose output is lost exits with 1."""
    qedimg = (sys.executable, "-m", "qedfuse.cli.qedimg")
    words = (*qedimg, "create", "-q", f"{image}.new", "1M")
    running = [(start(f'"$@" {CLOSINGS[-1]}', *words), 0)]
    for closing in ("0>&-", "1>&-", "2>&-", CLOSINGS[-1]):
        code = 1 if "1>&-" in closing else 0
        running.append((start(f'"$@" {closing}', *qedimg, "info", image), code))
    for process, code in running:
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == code
    assert qemu.check(image.with_name("vm.qed.new")).code == 0


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_lost_output_is_reported(word: str) -> None:
    """Help and version without a standard output print one line and exit with 2."""
    process = start('"$@" >&-', *COMMAND, word)
    printed, _ = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, printed) == (2, "qedfuse: standard output: Bad file descriptor\n")


def test_the_background_keeps_no_inherited_descriptor(image: Path, mnt: Path) -> None:
    """Neither the server nor its helper keeps a lock or a pipe that the caller had open."""
    script = """
        set -e
        ( flock 9; "${@:3}" "$1" "$2" ) 9>"$1.lock"
        flock --nonblock "$1.lock" echo free
        "${@:3}" umount "$2"
        { "${@:3}" "$1" "$2" 3>&1 >/dev/null; } | cat
        "${@:3}" umount "$2"
    """
    assert succeed(start(script, image, mnt, *COMMAND)) == "free\n"


def test_an_image_may_be_named_by_its_descriptor(image: Path, mnt: Path) -> None:
    """An inherited descriptor can name the image: it is opened before descriptors are closed."""
    script = """
        set -e
        "${@:3}" /dev/fd/7 "$2" -o ro 7<"$1"
        dd if="$2/$(ls "$2")" bs=64k count=1 status=none | tr -d '\\007' | wc -c
        "${@:3}" umount "$2"
    """
    assert succeed(start(script, image, mnt, *COMMAND)) == "0\n"
