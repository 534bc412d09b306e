"""``python -m qedfuse.cli.pages [DIRECTORY]``: write all pages and completions."""

from __future__ import annotations

import sys
from pathlib import Path

from qedfuse.cli.pages.tree import write

write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/share"))
