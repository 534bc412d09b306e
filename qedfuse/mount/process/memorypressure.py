"""Protection of the serving process while the machine is short of memory.

To free memory the kernel writes dirty pages back.  If the pages belong to a mounted disk, their
writeback needs the server.  If the server then waits for free memory, or is throttled because it
dirties pages, the kernel and the server wait for each other forever.  ``PR_SET_IO_FLUSHER``
(prctl(2)) marks the calling thread as part of the kernel's writeback path.  The kernel then
allocates memory for the thread without starting I/O (``GFP_NOIO``), and throttles it by the state
of the host's own disk only.  New threads and child processes inherit the mark.  So the server must
call `protect_from_memory_pressure` before it has a second thread.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

OOM_SCORE_ADJ: Final = -500
"""The OOM score adjustment of the process.  The OOM killer subtracts half of the machine's memory
from what the process uses.  So it chooses other processes first, but can still choose a server that
leaks memory."""

_PR_SET_IO_FLUSHER: Final = 57  # linux/prctl.h, Linux 5.6 and newer
_OOM_SCORE_ADJ_FILE: Final = Path("/proc/self/oom_score_adj")

_prctl: Final = ctypes.CDLL(None, use_errno=True).prctl
_prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def protect_from_memory_pressure(oom_score_adj: Path = _OOM_SCORE_ADJ_FILE) -> str | None:
    """Mark the calling thread as part of the kernel's writeback path, if the kernel permits this.

    For root, the OOM score adjustment of the process is also lowered to `OOM_SCORE_ADJ`, if the
    administrator has not set it.

    Args:
        oom_score_adj: The file with the process's OOM score adjustment.

    Returns:
        One line with what was refused and why; None if nothing was refused.
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
