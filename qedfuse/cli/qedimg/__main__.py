"""``python -m qedfuse.cli.qedimg`` is the command ``qedimg``."""

from __future__ import annotations

import sys

from qedfuse.cli.entrypoints import qedimg_program

sys.exit(qedimg_program())
