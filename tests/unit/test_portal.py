"""The door from synchronous code into an event loop: every way in, and every way to the end."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from qedfuse.util.portal import Portal, PortalClosedError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Room:
    """What the portals in these tests lead to; notes what happens to it."""

    def __init__(self) -> None:
        """Make a room that nobody is in."""
        self.seen: list[str] = []
        self.entered = threading.Event()
        self.go = threading.Event()

    def note(self, what: str) -> None:
        """Remember what happened."""
        self.seen.append(what)

    async def echo(self, value: object) -> object:
        """Give back what was given, from the event loop's thread."""
        await trio.lowlevel.checkpoint()
        self.note(threading.current_thread().name)
        return value

    async def fail(self) -> None:
        """Fail as an operation may."""
        msg = "fail"
        raise LookupError(msg)

    async def wait(self) -> str:
        """Say that the call is under way, and end when told to."""
        self.entered.set()
        await trio.to_thread.run_sync(self.go.wait)
        self.note("waited")
        return "waited"


@asynccontextmanager
async def room(
    into: Room, *, enter: Exception | None = None, leave: Exception | None = None
) -> AsyncIterator[Room]:
    """Open a room; fail at the door in either direction if told to."""
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
    """Calls come back with their result or error, and the thread ends with close."""
    portal = Portal(room(Room()), "test calls")
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
    """What opening raises is raised where the portal is made; no thread is left."""
    inside = Room()
    with pytest.raises(LookupError, match="enter"):
        Portal(room(inside, enter=LookupError("enter")), "test enter")
    assert threads() == []
    assert inside.seen == []


def test_error_on_the_way_out() -> None:
    """What closing raises is raised by close, once; the thread ends all the same."""
    portal = Portal(room(Room(), leave=LookupError("leave")), "test leave")
    with pytest.raises(LookupError, match="leave"):
        portal.close()
    portal.close()
    assert threads() == []
    with pytest.raises(PortalClosedError):
        portal.call(portal.value.echo, 1)


def test_close_waits_for_calls_under_way() -> None:
    """A call that is running when another thread closes finishes before the room is left."""
    inside = Room()
    portal = Portal(room(inside), "test under way")
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


def test_many_threads_call_at_once() -> None:
    """Calls from many threads all get their own answers."""
    portal = Portal(room(Room()), "test many")
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
    """It can be used in the portal's own thread, where waiting would be for ever."""
    inside = Room()
    portal = Portal(room(inside), "test ask")

    async def ask() -> None:
        portal.ask_to_close()

    portal.call(ask)
    portal.close()
    assert inside.seen == ["left"]


@pytest.mark.expect_log("test log: nobody asked")
def test_failure_that_nobody_waits_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """If nobody calls close the log has what went wrong."""
    portal = Portal(room(Room(), leave=LookupError("nobody asked")), "test log")
    portal.ask_to_close()
    for thread in threading.enumerate():
        if thread.name == "test log":
            thread.join()
    assert [record.getMessage() for record in caplog.records] == ["test log: nobody asked"]


@pytest.mark.expect_log("test crash: ")
def test_crash_inside_fails_the_calls_under_way() -> None:
    """When what is open breaks down, callers get an error instead of waiting for ever."""
    inside = Room()

    async def fail_once_entered() -> None:
        await trio.to_thread.run_sync(inside.entered.wait)
        raise LookupError

    @asynccontextmanager
    async def breaks() -> AsyncIterator[Room]:
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
    # While it is being left, and after that.
    with pytest.raises(PortalClosedError):
        portal.call(inside.echo, 1)
    inside.go.set()
    with pytest.raises(ExceptionGroup):
        portal.close()
    with pytest.raises(PortalClosedError):
        portal.call(portal.value.echo, 1)


def run_program(body: str) -> str:
    """Run a program of its own and give what it printed; it must end, and without complaint."""
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
from tests.unit.test_portal import Portal, PortalClosedError, Room, room

class Loud(Room):
    def note(self, what):
        print(what, flush=True)

inside = Loud()
portal = Portal(room(inside), "test exit")
"""


def test_program_that_ends_without_closing() -> None:
    """What is open when the program ends is closed then."""
    assert run_program("print('end', flush=True)") == "end\nleft\n"


def test_program_that_fails_without_closing() -> None:
    """An unhandled error, or sys.exit, ends the program as well."""
    assert run_program("raise SystemExit(0)") == "left\n"


def test_threads_may_go_on_after_the_main_thread() -> None:
    """While another thread of the program runs, the portal stays open for it."""
    body = """
def work():
    threading.main_thread().join()
    print(portal.call(inside.wait), flush=True)
inside.go.set()
threading.Thread(target=work).start()
"""
    assert run_program(body) == "waited\nwaited\nleft\n"


def test_forked_child_is_told() -> None:
    """A child cannot use its parent's portal, ends without hanging, and closes nothing."""
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
    expected = "the event loop that this call needs has ended\ntest exit\nparent 1\nleft\n"
    assert run_program(body) == expected
