"""``python -m qedfuse.cli.qedimg``: the same as ``qedimg``."""

from __future__ import annotations

import sys

from qedfuse.cli.qedimg import program

sys.exit(program())
