"""Running a target on inputs in this process, with limits on memory and time; no coverage needed.

A finding is any exception that the target raises.  The input is made smaller, and is printed in a
form that repeats it.
"""

from __future__ import annotations

import gc
import random
import resource
import signal
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.fuzz import corpus
from tests.fuzz.mutation import Mutator
from tests.fuzz.targets.registry import target_named

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from tests.fuzz.targets.target import Target

_MAX_MEMORY_BYTES: Final = 256 << 20
"""How much memory an input may allocate beyond what the process has.  The largest buffer that a
parser needs has 32 MiB, the payload of an NBD server."""
_MAX_CPU_SECONDS: Final = 20.0
"""Maximum time of the processor for one input, so that an endless loop becomes a finding."""
_MAX_SHRINK_TRIES: Final = 2000
_MAX_TRIES_PER_PEER: Final = 20
"""How many inputs are tried for each question to QEMU; some are refused before."""


class TooSlowError(Exception):
    """An input has taken more than `_MAX_CPU_SECONDS` of the processor's time."""


def run_inputs(name: str, count: int, seed: int, seconds: float = float("inf")) -> int:
    """Pass the kept inputs and drawn inputs to a target; return how many were passed.

    Args:
        name: The target.
        count: Maximum number of drawn inputs.
        seed: The seed of the generator.
        seconds: Time after which no further input is drawn.

    Raises:
        AssertionError: An input is a finding; the message has the smallest one and the exception.
    """
    target = target_named(name)
    kept = [*target.seeds(), *corpus.load(name)]
    mutator = Mutator(random.Random(seed), kept, target.tokens, target.max_bytes)
    end = time.monotonic() + seconds
    done = 0
    with limits():
        for data in kept:
            _check(name, target, data)
            done += 1
        for _ in range(count):
            if time.monotonic() >= end:
                break
            _check(name, target, mutator.draw())
            done += 1
    return done


def ask_peers(name: str, count: int, seed: int) -> int:
    """Let QEMU judge kept and drawn inputs of a target; return how many it was asked about.

    Args:
        name: The target, which must have a peer.
        count: How often QEMU is asked.
        seed: The seed of the generator.

    Raises:
        AssertionError: QEMU makes something else of an input.
    """
    target = target_named(name)
    assert target.ask_peer is not None
    kept = [*target.seeds(), *corpus.load(name)]
    mutator = Mutator(random.Random(seed), kept, target.tokens, target.max_bytes)
    asked = 0
    for number in range(count * _MAX_TRIES_PER_PEER):
        if asked == count:
            break
        data = kept[number] if number < len(kept) else mutator.draw()
        try:
            asked += target.ask_peer(data)
        except AssertionError as error:
            msg = f"{name}: QEMU: {error}\n  {data.hex()}"
            raise AssertionError(msg) from error
    return asked


def check_input(target: Target, data: bytes) -> Exception | None:
    """Pass an input to a target; return the exception that makes it a finding, None without one."""
    signal.setitimer(signal.ITIMER_VIRTUAL, _MAX_CPU_SECONDS)
    try:
        target.check(data)
    except Exception as error:  # noqa: BLE001  every exception is a finding
        return error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return None


def check_one(name: str, data: bytes) -> None:
    """Pass one input to a target, with the limits of a run.

    Raises:
        AssertionError: The input is a finding; the message has the smallest one and the exception.
    """
    with limits():
        _check(name, target_named(name), data)


@contextmanager
def limits() -> Iterator[None]:
    """Limit the memory and the time of the inputs in the ``with`` block.

    More memory raises MemoryError, and more time `TooSlowError`; both are findings.
    """
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    used = int(status.partition("VmData:")[2].split()[0]) << 10
    old_limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + _MAX_MEMORY_BYTES, old_limits[1]))
    old_handler = signal.signal(signal.SIGVTALRM, _stop)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, old_limits)
        signal.signal(signal.SIGVTALRM, old_handler)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    """End an input that takes too long."""
    msg = f"found an input that takes more than {_MAX_CPU_SECONDS:.0f} seconds"
    raise TooSlowError(msg)


def _check(name: str, target: Target, data: bytes) -> None:
    """Pass an input to a target; raise AssertionError for a finding, after making it smaller."""
    error = check_input(target, data)
    if error is not None:
        smallest, error = _shrunk(target, data, error)
        shown = f"{type(error).__name__}: {error}"
        msg = f"{name}: {shown}\n  python -m tests.fuzz --target {name} --input {smallest.hex()}"
        raise AssertionError(msg) from error


def _place(error: Exception) -> tuple[type[Exception], str, int]:
    """Return the type of an exception, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return type(error), frame.filename, frame.lineno or 0


def _shrunk(target: Target, data: bytes, error: Exception) -> tuple[bytes, Exception]:
    """Return the smallest input found that raises the same exception, and its exception."""
    size, tries = max(1, len(data) // 2), 0
    while size and tries < _MAX_SHRINK_TRIES and not isinstance(error, TooSlowError):
        at = 0
        while at < len(data) and tries < _MAX_SHRINK_TRIES:
            tries += 1
            shorter = data[:at] + data[at + size :]
            found = check_input(target, shorter)
            if found is not None and _place(found) == _place(error):
                data, error = shorter, found
            else:
                at += size
        size //= 2
    return data, error
