"""The C extensions are built where the tests run: a missing one would be left out silently."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.extensions import EXPECTED, MODULES


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
