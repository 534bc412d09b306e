"""``python -m qedfuse.cli.pages [DIRECTORY]``: write all pages and completions."""

from __future__ import annotations

import argparse
from pathlib import Path

from qedfuse.cli.pages.tree import write

parser = argparse.ArgumentParser(
    prog="python -m qedfuse.cli.pages",
    description="Write the man pages and the completions of all shells.",
)
parser.add_argument(
    "directory",
    metavar="DIRECTORY",
    nargs="?",
    type=Path,
    default=Path("docs/share"),
    help="where to write the pages and the completions (docs/share)",
)
write(parser.parse_args().directory)
