"""An ordinary user of the tests, who may use the FUSE device for a while."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qedfuse.mount.system.recorddirectory import record_directories
from tests.support.directorylock import locked
from tests.support.mounted import clean_up, without_notice
from tests.support.programs import environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

USER_ID: Final = 65534
DEVICE: Final = Path("/dev/fuse")

# The capability lets the user search directories: the interpreter may lie in root's home.
AS_USER: Final = (
    *("setpriv", f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)


@contextmanager
def user_directory() -> Iterator[Path]:
    """Give a directory of the user with an empty one, ``mnt``; the user may mount in the block.

    Only one test has such a user at a time: the mode of the device and the user's mount records
    exist once on the machine.
    """
    with locked(DEVICE.parent):
        mode = DEVICE.stat().st_mode & 0o777
        DEVICE.chmod(0o666)
        try:
            # Not in the directory of the test, which the user may not search.
            with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
                path = Path(name)
                (path / "mnt").mkdir()
                for entry in (path, path / "mnt"):
                    os.chown(entry, USER_ID, USER_ID)
                try:
                    yield path
                finally:
                    clean_up(path / "mnt")
        finally:
            DEVICE.chmod(mode)
            shutil.rmtree(record_directories(USER_ID)[-1], ignore_errors=True)


def as_user(
    *words: str | Path, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command as the user, with some more environment variables."""
    done = subprocess.run(
        [*AS_USER, *(str(word) for word in words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        cwd="/",
        env=environment() | {"HOME": "/"} | dict(variables or {}),
        check=False,
    )
    done.stderr = without_notice(done.stderr)
    return done
