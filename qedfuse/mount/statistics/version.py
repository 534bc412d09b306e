"""The version of the document of statistics, for its writer and its reader."""

from __future__ import annotations

from typing import Final

VERSION: Final = 1
"""The version of the document.  It changes if a field changes its meaning or is removed."""
