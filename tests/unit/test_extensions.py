"""The C extensions are built where the tests run, and belong to the Python code.

A missing extension would be left out silently.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.util.extensions import InterfaceError, import_extension
from tests.support.disks import build_image, pattern
from tests.support.extensions import EXPECTED, MODULES, needs_extensions, outdated_extensions
from tests.support.programs import environment, run

if TYPE_CHECKING:
    from pathlib import Path

_LOADERS: Final = {
    "qedfuse.check._sweep": "from qedfuse.check.fastcheck import _load\nused = _load()",
    "qedfuse.hostio._iothreads": "from qedfuse.hostio.nativecalls import _extension as used",
    "qedfuse.mount.fuse._extraops": (
        "from qedfuse.mount.fuse import extraops\nused = extraops._extension\n"
        "sys.stderr.write(extraops._load_error)"
    ),
    "qedfuse.mount.sandbox._threads": (
        "from qedfuse.mount.sandbox.privileges import thread_restrictor\nused = thread_restrictor()"
    ),
    "qedfuse.remote._crc32": "from qedfuse.remote.unitfile import _extension as used",
    "qedfuse.tools.inspection._maplines": (
        "from qedfuse.tools.inspection.fastmap import _load\nused = _load()"
    ),
}
"""Code that loads each extension, and sets ``used`` to None if the extension is not used."""


def load(name: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """Load an extension in a new process, which prints whether the extension is used."""
    code = f"import sys\n{prelude}\n{_LOADERS[name]}\nprint(used is not None)"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )


def warning(directory: Path, name: str) -> str:
    """Return the warning about an extension of `outdated_extensions`."""
    expected = importlib.import_module(name).INTERFACE
    return (
        f"{directory}/{name}.so is not used: found interface 99, expected {expected}: it was built "
        "from another version of the sources, install qedfuse again"
    )


@pytest.mark.parametrize("name", MODULES)
def test_an_extension_loads_if_and_only_if_it_is_expected(name: str) -> None:
    """Each extension loads, or none is there in a run that is to test without extensions."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, check=False
    )
    if EXPECTED:
        assert done.returncode == 0, done.stderr
    else:
        assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


@needs_extensions
@pytest.mark.parametrize("name", MODULES)
def test_an_extension_has_the_number_of_its_loader(name: str) -> None:
    """The C source and the module that loads the extension have the same interface number."""
    done = load(name)
    assert (done.stdout, done.stderr) == ("True\n", "")


@needs_extensions
def test_an_extension_of_another_version_is_not_used(tmp_path: Path) -> None:
    """An extension with another number is not used, and one line says why."""
    prelude = outdated_extensions(tmp_path)
    for name in MODULES:
        done = load(name, prelude)
        assert done.stdout == "False\n"
        assert done.stderr.rstrip("\n") == warning(tmp_path, name)


@needs_extensions
def test_qedimg_works_beside_extensions_of_another_version(tmp_path: Path) -> None:
    """The result of a command is the same, and its errors have one line for each extension."""
    prelude = outdated_extensions(tmp_path)
    image = tmp_path / "image.qed"
    image.write_bytes(build_image(1 << 20, {3: pattern(4096, 1)}))
    for command, name in (("check", MODULES[0]), ("map", MODULES[-1])):
        right = run("qedimg", command, image, timeout=60)
        done = run("qedimg", command, image, timeout=60, prelude=prelude)
        assert (done.returncode, done.stdout) == (0, right.stdout)
        assert f"qedimg: {warning(tmp_path, name)}" in done.stderr.splitlines()
        assert len(re.findall("is not used", done.stderr)) == len(done.stderr.splitlines())


def test_an_extension_without_a_number_is_not_used() -> None:
    """An extension from before there were numbers is one of another version."""
    with pytest.raises(InterfaceError, match="found interface none, expected 1"):
        import_extension("json", 1)
