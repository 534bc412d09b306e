"""Man pages and shell completions, generated from the programs' parsers and help.

``python -m qedfuse.cli.pages`` writes them below ``docs/share/``, from where they are installed.
"""

from __future__ import annotations
