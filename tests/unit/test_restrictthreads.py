"""All threads of a process give up their rights, also if some end or refuse meanwhile."""

from __future__ import annotations

import errno
import subprocess
import sys
from typing import Final

from tests.support.extensions import needs_extensions

pytestmark = needs_extensions

_TIMEOUT: Final = 60.0

_PROLOGUE: Final = """
import ctypes, os, pathlib, platform, signal, struct, threading
from qedfuse.mount.sandbox._threads import restrict_threads
from qedfuse.mount.sandbox.privileges import SIGNAL

SYS_EXIT, SYS_TGKILL = (60, 234) if platform.machine() == "x86_64" else (93, 131)

libc = ctypes.CDLL(None, use_errno=True)
returned = threading.Event()

def is_restricted(thread):
    words = pathlib.Path(f"/proc/self/task/{thread}/status").read_text().split()
    return words[words.index("NoNewPrivs:") + 1] == "1"

def block():
    signal.pthread_sigmask(signal.SIG_BLOCK, [SIGNAL])

def unblock():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [SIGNAL])

def start(function):
    thread = threading.Thread(target=function)
    thread.start()
    return thread

def wait_until(condition):
    while not condition():
        os.sched_yield()

def is_pending():
    return SIGNAL in signal.sigpending()

def is_waiting(thread):
    path = pathlib.Path(f"/proc/self/task/{thread}/syscall")
    return path.read_text().split()[0] in ("35", "101", "115", "230")  # (clock_)nanosleep
"""

_REFUSED_SIGNAL: Final = """
main = os.getpid()
is_blocked, may_end = threading.Event(), threading.Event()

def react_late():
    block()
    is_blocked.set()
    wait_until(is_pending)
    wait_until(lambda: returned.is_set() or is_waiting(main))
    unblock()
    may_end.wait()

late = start(react_late)
is_blocked.wait()
other = start(may_end.wait)

# A filter of system calls refuses the signal to the second thread.
libc.prctl(38, 1, 0, 0, 0)
code = b"".join(struct.pack("=HBBI", *line) for line in [
    (0x20, 0, 0, 0),  # the number of the system call
    (0x15, 0, 3, SYS_TGKILL),
    (0x20, 0, 0, 24),  # the second argument
    (0x15, 0, 1, other.native_id),
    (0x06, 0, 0, 0x00050000 | 11),  # EAGAIN
    (0x06, 0, 0, 0x7FFF0000),
])
buffer = ctypes.create_string_buffer(code)
program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
assert libc.prctl(22, 2, program, 0, 0) == 0
try:
    restrict_threads(-1, 0, SIGNAL)
except OSError as error:
    print(error.errno, is_restricted(late.native_id), is_restricted(other.native_id))
returned.set()
may_end.set()
late.join()
print(signal.getsignal(SIGNAL) == signal.SIG_DFL)
"""

_ENDING_THREAD: Final = """
is_blocked = threading.Event()

def end_with_signal():
    block()
    is_blocked.set()
    wait_until(is_pending)

thread = start(end_with_signal)
is_blocked.wait()
print(restrict_threads(-1, 0, SIGNAL))
"""

_ENDED_MAIN_THREAD: Final = """
def restrict():
    wait_until(lambda: "(zombie)" in pathlib.Path(f"/proc/{os.getpid()}/status").read_text())
    print(restrict_threads(-1, 0, SIGNAL), flush=True)
    os._exit(0)

start(restrict)
libc.syscall(SYS_EXIT, 0)
"""


def run(script: str) -> list[str]:
    """Run a script in a process of its own; return the words that it has printed."""
    done = subprocess.run(
        [sys.executable, "-c", _PROLOGUE + script],
        capture_output=True, text=True, check=False, timeout=_TIMEOUT,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_a_signal_that_is_refused_does_not_leave_others_behind() -> None:
    """The handlers of the threads that got the signal finish before the error is raised."""
    assert run(_REFUSED_SIGNAL) == [str(errno.EAGAIN), "True", "False", "True"]


def test_a_thread_that_ends_with_the_signal_is_not_waited_for() -> None:
    """A thread that ends before its handler has run counts as done."""
    assert run(_ENDING_THREAD) == ["2"]


def test_a_main_thread_that_has_ended_is_not_waited_for() -> None:
    """The kernel lists the main thread and accepts signals to it until the process ends."""
    assert run(_ENDED_MAIN_THREAD) == ["1"]
