"""The public names of the package, and the cost of importing it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qedfuse
from qedfuse.errors import QedError

PUBLIC = [
    "BackingPolicy",
    "Disk",
    "DiskFile",
    "OpenOptions",
    "QedError",
    "create_image",
    "open",
    "open_disk",
]


def test_names() -> None:
    """Exactly the documented names are public, and each has a docstring."""
    assert qedfuse.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(qedfuse))
    for name in PUBLIC:
        assert getattr(qedfuse, name).__doc__


def test_names_are_the_things_themselves() -> None:
    """A public name is the object of its module, so that ``except qedfuse.QedError`` works."""
    assert qedfuse.QedError is QedError
    assert qedfuse.open.__module__ == "qedfuse.api"


def test_unknown_name() -> None:
    """An unknown name raises AttributeError."""
    with pytest.raises(AttributeError, match="module 'qedfuse' has no attribute 'missing'"):
        _ = qedfuse.missing  # type: ignore[attr-defined]


def test_import_is_cheap() -> None:
    """Importing the package imports none of its modules."""
    program = "import sys, qedfuse; print(*[name for name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(qedfuse.__file__).parents[1],
    )
    loaded = done.stdout.split()
    assert [name for name in loaded if name.startswith("qedfuse")] == ["qedfuse"]
    assert not {"trio", "numpy", "construct", "pyfuse3"} & set(loaded)


def test_package_says_that_it_is_typed() -> None:
    """The package has the marker py.typed."""
    assert (Path(qedfuse.__file__).parent / "py.typed").exists()
