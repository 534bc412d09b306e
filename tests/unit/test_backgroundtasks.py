"""Errors of tasks that run beside a block reach the caller as one error, not as a group."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from qedfuse.errors import HostError
from qedfuse.util.backgroundtasks import background_tasks


async def fail(error: Exception) -> None:
    """Raise an error when the task is cancelled."""
    try:
        await trio.sleep_forever()
    finally:
        raise error


async def fail_beside(error: Exception) -> None:
    """Fail in the block, and then with ``error`` in a task."""
    async with background_tasks() as nursery:
        nursery.start_soon(fail, error)
        await trio.testing.wait_all_tasks_blocked()
        msg = "block"
        raise HostError(msg)


async def fail_when_cancelled(scope: trio.CancelScope, error: Exception | None) -> None:
    """Cancel the caller's scope while several tasks run; one fails, unless ``error`` is None."""
    async with background_tasks() as nursery:
        nursery.start_soon(trio.sleep_forever)
        async with trio.open_nursery() as inner:
            inner.start_soon(trio.sleep_forever)
            if error is not None:
                inner.start_soon(fail, error)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep_forever()


@pytest.mark.parametrize(
    "error", [HostError("task"), OSError("task")], ids=["HostError", "OSError"]
)
async def test_the_first_of_several_errors_is_raised(
    caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """If the block and a task fail, the caller gets the error of the block; the log has both."""
    caplog.set_level("DEBUG", "qedfuse.util.backgroundtasks")
    with pytest.raises(HostError, match="block"):
        await fail_beside(error)
    assert caplog.messages == ["another task has failed too: task"]


async def test_an_error_beside_a_cancellation_is_raised() -> None:
    """If the caller is cancelled and a task fails, the caller gets the error and no group."""
    with trio.CancelScope() as scope, pytest.raises(HostError, match="task"):
        await fail_when_cancelled(scope, HostError("task"))


async def test_a_bug_is_not_hidden_by_an_error() -> None:
    """If one of several errors is a bug, all of them are raised."""
    with pytest.raises(ExceptionGroup) as caught:
        await fail_beside(ZeroDivisionError())
    assert {type(error) for error in caught.value.exceptions} == {HostError, ZeroDivisionError}


async def test_a_cancellation_alone_stays_one() -> None:
    """If the caller is cancelled and nothing fails, its scope ends without an error."""
    with trio.CancelScope() as scope:
        await fail_when_cancelled(scope, None)
    assert scope.cancelled_caught
