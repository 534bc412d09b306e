"""Running a target with atheris, which mutates the inputs that reach new code of qedfuse.

atheris is needed on demand only: ``pip install atheris``.  Its engine, libFuzzer, ends the process
in which it runs, so the parent process starts this module as a program.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.fuzz import corpus
from tests.fuzz.targets.scratch import PARENT_VARIABLE, memory_directory

if TYPE_CHECKING:
    from types import ModuleType

_MAX_RESIDENT_MEGABYTES: Final = 2048
_MAX_INPUT_SECONDS: Final = 60
_FINDING: Final = "finding-"


def has_atheris() -> bool:
    """Return whether atheris is installed."""
    return importlib.util.find_spec("atheris") is not None


def run_guided(
    name: str, count: int, seed: int, seconds: float
) -> tuple[list[bytes], bytes | None]:
    """Fuzz a target in another process.

    Args:
        name: The target.
        count: Maximum number of inputs; 0 for no limit.
        seed: The seed of libFuzzer.
        seconds: Maximum time.

    Returns:
        The inputs that reached new code, and an input that is a finding, or None.

    Raises:
        AssertionError: atheris failed without a finding.
    """
    with tempfile.TemporaryDirectory(prefix="qedfuse-fuzz-", dir=memory_directory()) as scratch:
        inputs = Path(scratch, "inputs")
        inputs.mkdir()
        arguments = [
            *(f"-runs={count or -1}", f"-max_total_time={max(1, int(seconds))}", f"-seed={seed}"),
            *(f"-timeout={_MAX_INPUT_SECONDS}", f"-rss_limit_mb={_MAX_RESIDENT_MEGABYTES}"),
            "-len_control=0",  # otherwise short inputs come first, and the seeds are cut
            *(f"-artifact_prefix={scratch}/{_FINDING}", "-print_final_stats=1", str(inputs)),
        ]
        command = [sys.executable, "-m", "tests.fuzz.guided", name, *arguments]
        # libFuzzer ends its process without removing the files of the target.
        variables = os.environ | {PARENT_VARIABLE: scratch}
        code = subprocess.run(command, env=variables, check=False).returncode
        found = [path.read_bytes() for path in sorted(inputs.iterdir())]
        findings = [path.read_bytes() for path in Path(scratch).glob(f"{_FINDING}*")]
    assert findings or not code, f"{name}: atheris ended with exit code {code}, expected 0"
    return found, findings[0] if findings else None


def _fuzz(name: str, arguments: list[str]) -> None:
    """Fuzz a target in this process, which libFuzzer ends."""
    atheris: ModuleType = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["qedfuse"]):
        from tests.fuzz.targets.registry import target_named  # noqa: PLC0415  instruments imports

        target = target_named(name)
    inputs = Path(arguments[-1])
    words = inputs.with_name("words")
    quoted = ("".join(f"\\x{byte:02x}" for byte in token) for token in target.tokens if token)
    words.write_text("".join(f'"{token}"\n' for token in quoted), encoding="ascii")
    for number, data in enumerate((*target.seeds(), *corpus.load(name))):
        (inputs / f"seed-{number}").write_bytes(data)
    if target.tokens:  # an empty file is an error for libFuzzer
        arguments = [f"-dict={words}", *arguments]
    arguments = [f"-max_len={target.max_bytes}", *arguments]
    atheris.Setup([sys.argv[0], *arguments], target.check, enable_python_coverage=True)
    atheris.Fuzz()


if __name__ == "__main__":
    _fuzz(sys.argv[1], sys.argv[2:])
