"""``python -m qedfuse`` is the command ``qedfuse``."""

from __future__ import annotations

import sys

from qedfuse.cli.qedfuse import main

if __name__ == "__main__":
    sys.exit(main())
