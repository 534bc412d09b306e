"""The portal from synchronous code into an event loop: calls, failures, and every way it ends."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio

import qedfuse
from qedfuse.errors import HostError
from qedfuse.util.portal import Portal
from qedfuse.util.portalcall import PortalClosedError
from tests.support.refusedcalls import CLONE3, run_without

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import FrameType
    from typing import Self

    from _typeshed import TraceFunction


class Resource:
    """What the portals in these tests keep open; it records what happens to it."""

    def __init__(self) -> None:
        """Create a closed resource."""
        self.seen: list[str] = []
        self.entered = threading.Event()
        self.go = threading.Event()

    def note(self, what: str) -> None:
        """Record an event."""
        self.seen.append(what)

    async def echo(self, value: object) -> object:
        """Return the argument, from the event loop's thread."""
        await trio.lowlevel.checkpoint()
        self.note(threading.current_thread().name)
        return value

    async def fail(self) -> None:
        """Fail as an operation may."""
        msg = "fail"
        raise LookupError(msg)

    async def wait(self) -> str:
        """Set ``entered``, and return once the test allows it."""
        self.entered.set()
        await trio.to_thread.run_sync(self.go.wait)
        self.note("waited")
        return "waited"


@asynccontextmanager
async def opened_resource(
    into: Resource, *, enter: Exception | None = None, leave: Exception | None = None
) -> AsyncIterator[Resource]:
    """Open a resource; raise ``enter`` on entering or ``leave`` on leaving."""
    await trio.lowlevel.checkpoint()
    if enter is not None:
        raise enter
    try:
        yield into
    finally:
        into.note("left")
        if leave is not None:
            raise leave


def threads() -> list[str]:
    """Name the portals' threads that are running."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("test")]


def test_calls_run_in_the_thread() -> None:
    """A call returns its result or raises its error, and the thread ends with close()."""
    portal = Portal(opened_resource(Resource()), "test calls")
    assert portal.is_alive()
    assert portal.call(portal.value.echo, 1) == 1
    with pytest.raises(LookupError, match="fail"):
        portal.call(portal.value.fail)
    assert portal.call(portal.value.echo, 2) == 2
    portal.close()
    assert portal.value.seen == ["test calls", "test calls", "left"]
    assert not portal.is_alive()
    assert threads() == []


def test_error_on_the_way_in() -> None:
    """An error on entering the context is raised by the constructor, and no thread is left."""
    inside = Resource()
    with pytest.raises(LookupError, match="enter"):
        Portal(opened_resource(inside, enter=LookupError("enter")), "test enter")
    assert threads() == []
    assert inside.seen == []


def test_no_thread(tmp_path: Path) -> None:
    """Without a thread the constructor raises OSError, and nothing is left; a later one works."""
    inside = Resource()
    for _ in range(2):
        with pytest.raises(OSError, match="cannot start a thread"):
            run_without(CLONE3, lambda: Portal(opened_resource(inside), "test refused"))
    assert (threads(), inside.seen) == ([], [])
    qed = tmp_path / "disk.qed"
    with pytest.raises(HostError, match=r"No such file"):
        qedfuse.open(qed)  # imports what starts threads itself (OpenBLAS)
    with pytest.raises(HostError, match=r"disk\.qed: open: Resource temporarily unavailable"):
        run_without(CLONE3, lambda: qedfuse.open(qed))
    portal = Portal(opened_resource(inside), "test later")
    assert portal.call(portal.value.echo, 1) == 1
    portal.close()


def test_error_on_the_way_out() -> None:
    """An error on leaving the context is returned by close(), and the thread ends."""
    failure = LookupError("leave")
    portal = Portal(opened_resource(Resource(), leave=failure), "test leave")
    assert portal.close() is failure
    assert portal.close() is failure
    assert threads() == []
    with pytest.raises(PortalClosedError):
        portal.call(portal.value.echo, 1)


def test_close_waits_for_calls_under_way() -> None:
    """A call that is running during a close() ends before the context is left."""
    inside = Resource()
    portal = Portal(opened_resource(inside), "test under way")
    results: list[str] = []
    caller = threading.Thread(target=lambda: results.append(portal.call(inside.wait)))
    caller.start()
    inside.entered.wait()
    closer = threading.Thread(target=portal.close)
    closer.start()
    inside.go.set()
    closer.join()
    caller.join()
    assert results == ["waited"]
    assert inside.seen == ["waited", "left"]


def test_many_threads_call_concurrently() -> None:
    """Concurrent calls of many threads get their own results."""
    portal = Portal(opened_resource(Resource()), "test many")
    answers: dict[int, object] = {}

    def ask(number: int) -> None:
        answers[number] = portal.call(portal.value.echo, number)

    callers = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    portal.close()
    assert answers == {number: number for number in range(20)}


def test_ask_to_close_does_not_wait() -> None:
    """ask_to_close() can be called in the portal's own thread."""
    inside = Resource()
    portal = Portal(opened_resource(inside), "test ask")

    async def ask() -> None:
        portal.ask_to_close()

    portal.call(ask)
    portal.close()
    assert inside.seen == ["left"]


@pytest.mark.expect_log("test log: close was not called")
def test_failure_without_close_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """An error on leaving the context is logged if close() is not called."""
    portal = Portal(
        opened_resource(Resource(), leave=LookupError("close was not called")), "test log"
    )
    portal.ask_to_close()
    for thread in threading.enumerate():
        if thread.name == "test log":
            thread.join()
    assert [record.getMessage() for record in caplog.records] == ["test log: close was not called"]


@pytest.mark.expect_log("test crash: ")
def test_crash_inside_fails_the_calls_under_way() -> None:
    """If the event loop breaks down, running calls raise an error."""
    inside = Resource()

    async def fail_once_entered() -> None:
        await trio.to_thread.run_sync(inside.entered.wait)
        raise LookupError

    @asynccontextmanager
    async def breaks() -> AsyncIterator[Resource]:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail_once_entered)
                yield inside
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(inside.go.wait)

    portal = Portal(breaks(), "test crash")

    async def hang() -> None:
        inside.entered.set()
        await trio.sleep_forever()

    with pytest.raises(PortalClosedError):
        portal.call(hang)
    # Once while the context is being left, and once after that.
    with pytest.raises(PortalClosedError):
        portal.call(inside.echo, 1)
    inside.go.set()
    assert isinstance(portal.close(), ExceptionGroup)
    with pytest.raises(PortalClosedError):
        portal.call(portal.value.echo, 1)


class Interrupt:
    """Raises KeyboardInterrupt at one instruction, as a signal handler can at any of them.

    Counts the instructions of the portal and, unless ``only_project`` is True, of the standard
    library's code for threads.

    Attributes:
        is_raised: Whether the exception was raised.
    """

    PROJECT: Final = ("portal.py", "portalcall.py", "portalthreads.py", "latch.py")
    LIBRARY: Final = ("threading.py", "_base.py")

    def __init__(self, number: int, *, only_project: bool = False) -> None:
        """Interrupt the calling thread at the instruction with this number."""
        self._files = self.PROJECT if only_project else self.PROJECT + self.LIBRARY
        self._left = number
        self.is_raised = False

    def __enter__(self) -> Self:
        """Start to count."""
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        """End the count; the exception ends here."""
        sys.settrace(None)
        return isinstance(error, KeyboardInterrupt)

    def _trace(self, frame: FrameType, event: str, _argument: object) -> TraceFunction | None:
        if Path(frame.f_code.co_filename).name not in self._files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and not self.is_raised:
            self._left -= 1
            if self._left < 0:
                self.is_raised = True
                raise KeyboardInterrupt
        return self._trace


def in_other_thread(work: Callable[[], None]) -> None:
    """Run ``work`` in a thread, and fail if it does not end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "the interrupted portal hangs"
    for error in errors:
        raise error


def test_a_call_can_be_interrupted_at_each_instruction() -> None:
    """After Ctrl-C at any point of a call, the next call works, and so does the close."""
    portal = Portal(opened_resource(Resource()), "test interrupted call")

    def interrupt_calls() -> None:
        for number in itertools.count():
            with Interrupt(number) as interrupt:
                portal.call(portal.value.echo, 1)
            assert portal.is_alive()
            assert portal.call(portal.value.echo, 2) == 2
            if not interrupt.is_raised:
                assert number > 30, "the instructions were not counted"
                break
        assert portal.close() is None

    in_other_thread(interrupt_calls)
    assert threads() == []


def test_an_interrupted_call_to_end_has_ended() -> None:
    """After Ctrl-C at any point of call_to_end(), its function does not run and has no effect."""
    inside = Resource()
    portal = Portal(opened_resource(inside), "test interrupted call to its end")
    running: list[int] = []

    async def work(number: int) -> int:
        running.append(number)
        try:
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
        finally:
            running.remove(number)
        inside.seen.append("worked")
        return number

    def interrupt_calls() -> None:
        for number in itertools.count():
            with Interrupt(number, only_project=True) as interrupt:
                assert portal.call_to_end(work, number) == number
            assert not running
            seen = len(inside.seen)
            assert portal.call(inside.echo, 1) == 1
            assert len(inside.seen) == seen + 1, "the interrupted call went on"
            if not interrupt.is_raised:
                assert number > 30, "the instructions were not counted"
                break
        assert portal.close() is None

    in_other_thread(interrupt_calls)


@pytest.mark.expect_log("test started: fail")
def test_a_started_call_is_not_waited_for() -> None:
    """start() runs a function before the portal closes, and logs its error."""
    inside = Resource()
    portal = Portal(opened_resource(inside), "test started")

    async def start() -> None:
        with pytest.raises(PortalClosedError):
            portal.call(inside.echo, 1)
        portal.start(inside.echo, 1)
        portal.start(inside.fail)
        portal.ask_to_close()

    portal.call(start)
    portal.close()
    assert inside.seen == ["test started", "left"]
    with pytest.raises(PortalClosedError):
        portal.start(inside.fail)


def test_a_thread_of_a_portal_does_not_wait_for_another() -> None:
    """A call from another portal's event loop or worker thread fails; one of the program works."""
    inside, others = Resource(), Resource()
    portal = Portal(opened_resource(inside), "test one")
    other = Portal(opened_resource(others), "test other")

    def call() -> object:
        return portal.call(inside.echo, 1)

    async def call_here() -> object:
        return call()

    async def call_in_worker() -> object:
        return await trio.to_thread.run_sync(call)

    for refused in (call_here, call_in_worker):
        with pytest.raises(PortalClosedError):
            other.call(refused)
    # The same worker thread may make this call, for the program.
    assert trio.run(call_in_worker) == 1
    assert other.close() is None
    assert portal.close() is None


@pytest.mark.expect_log("test interrupted close: leave")
def test_a_close_can_be_interrupted_at_each_instruction() -> None:
    """After Ctrl-C at any point of a close, Python knows the thread, and another close waits."""

    def interrupt_closes() -> None:
        for number in itertools.count():
            inside = Resource()
            failure = LookupError("leave")
            portal = Portal(opened_resource(inside, leave=failure), "test interrupted close")
            with Interrupt(number, only_project=True) as interrupt:
                portal.close()
            assert portal.close() is failure
            assert inside.seen == ["left"]
            assert threads() == []
            if not interrupt.is_raised:
                assert number > 30, "the instructions were not counted"
                break

    in_other_thread(interrupt_closes)


def run_program(body: str) -> str:
    """Run a program in a process of its own; return its output.  It must end without an error."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", PROGRAM + body],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


PROGRAM = """
import gc, os, threading
from tests.unit.test_portal import Portal, PortalClosedError, Resource, opened_resource

class Loud(Resource):
    def note(self, what):
        os.write(1, (what + "\\n").encode())  # not print: two threads could mix their lines

inside = Loud()
portal = Portal(opened_resource(inside), "test exit")
"""


def test_program_that_ends_without_closing() -> None:
    """At the end of the program open contexts are left."""
    assert run_program("print('end', flush=True)") == "end\nleft\n"


def test_program_that_fails_without_closing() -> None:
    """An unhandled exception, or sys.exit, ends a program with an open portal."""
    assert run_program("raise SystemExit(0)") == "left\n"


@pytest.mark.parametrize("end", ["raise", "portal.close(); print('closed', flush=True)"])
def test_signal_during_a_close(end: str) -> None:
    """After a signal handler's exception in close(), another close and the program's end wait."""
    body = f"""
import signal, trio
from contextlib import asynccontextmanager

signal.signal(signal.SIGTERM, lambda *_: exit(0))
go = threading.Event()

@asynccontextmanager
async def opened():
    yield
    os.kill(os.getpid(), signal.SIGTERM)
    go.wait()
    {"threading.main_thread().join()" if end == "raise" else ""}
    for _ in range(100):
        await trio.lowlevel.checkpoint()
    os.write(1, b"left slowly\\n")

slow = Portal(opened(), "test slow")
(thread,) = [thread for thread in threading.enumerate() if thread.name == "test slow"]
try:
    slow.close()
except SystemExit:
    print("interrupted", slow.is_alive(), thread.is_alive(), flush=True)
    go.set()
    {end.replace("portal", "slow")}
"""
    last = {"raise": ["left slowly", "left"]}.get(end, ["left slowly", "closed", "left"])
    printed = run_program(body).splitlines()
    assert printed[0] == "interrupted True True"
    assert sorted(printed[1:]) == sorted(last)
    if end != "raise":
        assert printed[1:] == last


def test_threads_may_go_on_after_the_main_thread() -> None:
    """The portal stays open while another thread of the program runs."""
    body = """
def work():
    threading.main_thread().join()
    print(portal.call(inside.wait), flush=True)
inside.go.set()
threading.Thread(target=work).start()
"""
    assert run_program(body) == "waited\nwaited\nleft\n"


def test_forked_child_gets_an_error() -> None:
    """A forked child gets an error from its parent's portal, ends, and closes nothing."""
    # From Python 3.12 on a program that forks beside a thread, as this one does, is warned.
    body = """
import warnings
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
child = os.fork()
if not child:
    try:
        portal.call(inside.echo, 1)
    except PortalClosedError as error:
        print(error, flush=True)
    portal.close()
    del portal
    gc.collect()
    raise SystemExit(0)
assert os.waitpid(child, 0)[1] == 0
print("parent", portal.call(inside.echo, 1), flush=True)
"""
    failure = "the event loop that the call needs is ending, has ended, or runs in another process"
    expected = f"{failure}\ntest exit\nparent 1\nleft\n"
    assert run_program(body) == expected


def test_a_fork_while_a_portal_is_being_opened() -> None:
    """A forked child opens portals, even if the lock for their list was held during the fork."""
    body = """
import signal, warnings
from qedfuse.util.portalthreads import watcher
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
held = watcher._lock
held.acquire()
child = os.fork()
if not child:
    signal.alarm(10)
    own = Portal(opened_resource(Loud()), "test child")
    print("child", own.call(own.value.echo, 2), flush=True)
    raise SystemExit(0)
held.release()
assert os.waitpid(child, 0)[1] == 0
print("parent", portal.call(inside.echo, 1), flush=True)
"""
    assert run_program(body) == "test child\nchild 2\nleft\ntest exit\nparent 1\nleft\n"
