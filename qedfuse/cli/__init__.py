"""The commands: words in, exit codes and text out."""

from __future__ import annotations

import os

# numpy would start threads for algebra, which cost time and memory even if there is none.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
