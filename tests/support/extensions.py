"""Which optional parts the tests find: all of them, or, on demand, not the C extensions.

With the environment variable ``QEDFUSE_HOST_CALLS`` set to ``threads`` no native thread makes calls
on the host's files.  With ``QEDFUSE_TEST_EXTENSIONS`` set to ``none``, as in
tests/without_extensions.sh, there must be no extension at all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Final

import pytest

from qedfuse.hostio.hostcalls import HOST_CALLS_VARIABLE

MODULES: Final = (
    "qedfuse.check._sweep",
    "qedfuse.hostio._iothreads",
    "qedfuse.mount.fuse._extraops",
    "qedfuse.mount.sandbox._threads",
    "qedfuse.remote._crc32",
    "qedfuse.tools.inspection._maplines",
)
"""The C extensions."""

EXPECTED: Final = os.environ.get("QEDFUSE_TEST_EXTENSIONS") != "none"
"""Whether the extensions must be there."""

NATIVE_THREADS: Final = EXPECTED and os.environ.get(HOST_CALLS_VARIABLE) != "threads"
"""Whether native threads make the calls on the host's files, and not threads of trio."""

needs_extensions: Final = pytest.mark.skipif(not EXPECTED, reason="without extensions")

_USE_OUTDATED: Final = """
import importlib.util
import sys
class Outdated:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in {modules!r}:
            return importlib.util.spec_from_file_location(name, {directory!r} + name + ".so")
sys.meta_path.insert(0, Outdated)
"""


def outdated_extensions(directory: Path) -> str:
    """Build all extensions with another interface number; return code that finds them.

    The file of an extension in ``directory`` has the name of its module and ``.so``.  The
    extensions have the number 99 and no functions.
    """
    built = directory / "outdated.so"
    include = sysconfig.get_path("include")
    source = Path(__file__).with_name("outdated.c")
    subprocess.run(["gcc", "-shared", "-fPIC", f"-I{include}", "-o", built, source], check=True)
    for name in MODULES:
        shutil.copy(built, directory / f"{name}.so")
    return _USE_OUTDATED.format(modules=MODULES, directory=f"{directory}/")
