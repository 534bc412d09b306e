"""``python -m qedfuse`` is the command ``qedfuse``."""

from __future__ import annotations

import sys

from qedfuse.cli.entrypoints import qedfuse_program

if __name__ == "__main__":
    sys.exit(qedfuse_program())
