"""The libraries for servers are imported only for URLs that need them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.disks import build_image
from tests.support.mounted import clean_up
from tests.support.programs import environment
from tests.support.webserver import serving

if TYPE_CHECKING:
    from pathlib import Path

LIBRARIES: Final = {"obstore", "urllib3"}
IMPORTED: Final = re.compile(r"^import time: .*\| +([\w.]+)$", re.MULTILINE)


@pytest.fixture
def local(tmp_path: Path) -> str:
    """Return the path of a local image."""
    path = tmp_path / "vm.qed"
    path.write_bytes(bytes(build_image(1 << 20)))
    return str(path)


def run(tmp_path: Path, source: str, program: str) -> set[str]:
    """Use a source in a new interpreter; return the names of all modules that were imported."""
    own = {
        "PYTHONPROFILEIMPORTTIME": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    start = [sys.executable, "-m"]
    mountpoint, log, ready = tmp_path / "mnt", tmp_path / "log", tmp_path / "ready"
    with log.open("w") as output:
        if program == "qedimg info":
            words = [*start, "qedfuse.cli.qedimg", "info", source]
            subprocess.run(words, check=True, stderr=output, env=environment() | own, timeout=120)
        else:
            mountpoint.mkdir()
            os.mkfifo(ready)
            words = [
                *start,
                "qedfuse",
                "-f",
                "-r",
                "--pidfile",
                str(ready),
                source,
                str(mountpoint),
            ]
            with subprocess.Popen(words, stderr=output, env=environment() | own) as server:
                try:
                    assert ready.read_text() == f"{server.pid}\n"
                    assert len(next(mountpoint.iterdir()).read_bytes()) == 1 << 20
                finally:
                    subprocess.run(["fusermount3", "-u", mountpoint], check=True)
                    clean_up(mountpoint)
            assert server.returncode == 0
    return set(IMPORTED.findall(log.read_text()))


@pytest.mark.parametrize("program", ["qedimg info", "qedfuse"])
def test_a_local_image_needs_no_library(tmp_path: Path, local: str, program: str) -> None:
    """Neither library is imported for a file of this machine."""
    imported = run(tmp_path, local, program)
    assert "qedfuse.disk.opening" in imported or "qedfuse.tools.inspection.info" in imported
    assert imported & LIBRARIES == set()


@pytest.mark.usefixtures("bare_environment")
@pytest.mark.parametrize("program", ["qedimg info", "qedfuse"])
@pytest.mark.parametrize(("scheme", "library"), [("http", "urllib3"), ("s3", "obstore")])
def test_a_url_needs_one_library(
    tmp_path: Path, program: str, scheme: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the library for the kind of server is imported."""
    with serving(bytes(build_image(1 << 20))) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        url = server.url if scheme == "http" else "s3://images/disk.qed"
        assert run(tmp_path, url, program) & LIBRARIES == {library}
