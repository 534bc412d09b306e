"""Protection of the serving process while the machine is short of memory.

To free memory the kernel writes dirty pages back.  Where they belong to a mounted disk,
that needs the serving process.  If the process itself has to wait for free memory
meanwhile, or for its turn to dirty more pages, each waits for the other.
``PR_SET_IO_FLUSHER`` tells the kernel that the process is part of its writeback path: then
it allocates without starting I/O (``GFP_NOIO``), and is throttled by the state of the
host's own disk only.  The flag belongs to a thread.  Its new threads and child processes
inherit it, and execve(2) keeps it; so it is set before there is a second thread.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

OOM_SCORE_ADJ: Final = -500
"""Half of the machine's memory is not counted against the process: the OOM killer chooses
others first, but can still choose a server that leaks memory."""

_PR_SET_IO_FLUSHER: Final = 57  # linux/prctl.h, Linux 5.6 and newer
_OOM_SCORE_ADJ_FILE: Final = Path("/proc/self/oom_score_adj")

_prctl: Final = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def protect_from_memory_pressure(oom_score_adj: Path = _OOM_SCORE_ADJ_FILE) -> str | None:
    """Mark the calling process as part of the kernel's writeback path, where that is permitted.

    For root the OOM score adjustment is lowered to `OOM_SCORE_ADJ` as well, unless somebody
    has chosen another value than the kernel's.

    Args:
        oom_score_adj: The file with the process's OOM score adjustment.

    Returns:
        What was refused and why, in one line, or None.
    """
    refused = []
    if _prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0):
        refused.append(f"PR_SET_IO_FLUSHER: {os.strerror(ctypes.get_errno())}")
    if os.geteuid() == 0:
        try:
            if int(oom_score_adj.read_text()) == 0:
                oom_score_adj.write_text(str(OOM_SCORE_ADJ))
        except (OSError, ValueError) as error:
            reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            refused.append(f"oom_score_adj: {reason}")
    if not refused:
        return None
    return (
        f"not protected while memory is short: {', '.join(refused)} "
        "(expected CAP_SYS_RESOURCE and Linux 5.6; see Limits in qedfuse's README)"
    )
