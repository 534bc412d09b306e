"""Python's collector of reference cycles runs rarely only while a program starts."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from tests.support import qemu
from tests.support.mounted import TIMEOUT, front
from tests.support.programs import environment

if TYPE_CHECKING:
    from pathlib import Path

_REPORT: Final = """
import atexit, gc, json
report = open({path!r}, "w")  # now, because a server in a sandbox can open no file later
atexit.register(lambda: report.write(
    json.dumps([gc.get_threshold(), gc.get_freeze_count() > 0])
))
"""
_LISTED: Final = """
import sys
from qedfuse.cli.entrypoints import qedimg_program
sys.exit(qedimg_program())
"""
_AS_USUAL: Final = [list(gc.get_threshold()), True]


def test_a_server_collects_as_usual_but_not_its_modules(tmp_path: Path) -> None:
    """A server that is ready has the default thresholds, and collections skip what is loaded."""
    image, report = tmp_path / "disk.qed", tmp_path / "report"
    qemu.create(image, 1 << 20)
    with front(image, tmp_path / "mnt", prelude=_REPORT.format(path=str(report))) as mount:
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0
    assert json.loads(report.read_text()) == _AS_USUAL


def test_a_failed_start_collects_rarely(tmp_path: Path) -> None:
    """Until a mount is ready the collector runs rarely, and can visit all objects."""
    report = tmp_path / "report"
    script = _REPORT.format(path=str(report)) + _LISTED.replace("qedimg", "qedfuse")
    done = subprocess.run(
        [sys.executable, "-c", script, "-f", tmp_path / "missing.qed", tmp_path],
        env=environment(),
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode != 0
    (first, *others), is_frozen = json.loads(report.read_text())
    assert first > 10 * gc.get_threshold()[0]
    assert (others, is_frozen) == (list(gc.get_threshold()[1:]), False)


def test_a_subcommand_of_qedimg_collects_as_usual(tmp_path: Path) -> None:
    """A subcommand runs with the default thresholds, because a conversion may take hours."""
    image, report = tmp_path / "disk.qed", tmp_path / "report"
    qemu.create(image, 1 << 20)
    subprocess.run(
        [sys.executable, "-c", _REPORT.format(path=str(report)) + _LISTED, "info", image],
        env=environment(),
        capture_output=True,
        timeout=TIMEOUT,
        check=True,
    )
    assert json.loads(report.read_text()) == _AS_USUAL
