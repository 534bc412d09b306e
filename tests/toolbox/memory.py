"""Run qedimg in its own process, to measure its memory and the modules it loads."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

MIB: Final = 1 << 20

_SCRIPT: Final = """
import re, sys
from qedfuse.cli.qedimg.main import main
code = main(sys.argv[1:])
with open("/proc/self/status") as status:
    peak = re.search(r"VmHWM:\\s*(\\d+)", status.read())[1]
print(peak, *sys.modules, file=sys.stderr)
raise SystemExit(code)
"""


def run(*words: str | Path) -> tuple[str, int, set[str]]:
    """Run a command that must succeed.

    Returns:
        What it printed, the most memory it had in bytes, and the modules it loaded.
    """
    # The usage that wait4(2) reports would include the memory of this process before the exec.
    command = [sys.executable, "-c", _SCRIPT, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # A warning may come first.
    peak, *modules = done.stderr.splitlines()[-1].split()
    return done.stdout, int(peak) * 1024, set(modules)
