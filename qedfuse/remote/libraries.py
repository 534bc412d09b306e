"""The optional libraries for servers: which are needed, and how the user installs one of them."""

from __future__ import annotations

import shlex
import sys
from typing import Final

WEB_LIBRARY: Final = "urllib3>=2.2"
"""The library for web servers, as pip calls it and as pyproject.toml requires it."""
STORE_LIBRARY: Final = "obstore>=0.12"
"""The library for object stores, in the same form."""


def missing_library(*, is_web: bool) -> str:
    """Return the end of a message about a library that is missing or too old.

    The library must be installed where this program is: in its virtual environment if it has one,
    because another pip would install the library where this program does not look for it.

    Args:
        is_web: Whether the library is that for web servers; else it is that for stores.
    """
    library = WEB_LIBRARY if is_web else STORE_LIBRARY
    if sys.prefix != sys.base_prefix:
        python = shlex.quote(f"{sys.prefix}/bin/python")
        how = f"install it with: {python} -m pip install '{library}'"
    elif is_web:
        how = "Debian's package is python3-urllib3"
    else:
        how = "Debian has no package: use a virtual environment, as examples/install.sh does"
    return f"found no {library}, expected it ({how})"
