"""Man pages and shell completions, made from what the programs themselves know.

``python -m qedfuse.cli.pages`` writes them below ``docs/share/``, from where they are installed.
"""

from __future__ import annotations
