"""What SIGUSR1 and SIGUSR2 log: a summary of the statistics, and the tasks for a bug report."""

from __future__ import annotations

import logging
import os
import signal
from typing import TYPE_CHECKING, Any, Final

import trio

from qedfuse.text import printable
from qedfuse.util.sizes import three_digits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qedfuse.mount.statistics.document import StatisticsSource

_log = logging.getLogger(__name__)

_SIGNALS: Final = (signal.SIGUSR1, signal.SIGUSR2)
_MAX_TASKS: Final = 200
"""Maximum number of tasks that are logged one by one."""
_MEBIBYTE: Final = 1 << 20


async def log_on_signals(
    source: StatisticsSource, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Log a summary after each SIGUSR1 and SIGUSR2, and after SIGUSR2 also a line for each task.

    The caller must make the process ignore both signals before the call.  Otherwise the next signal
    after this task was cancelled would end the process.
    """
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        task_status.started()
        async for number in signals:
            document = await source.document()
            _log.info("%s", summary(document))
            if number == signal.SIGUSR2:
                for line in describe_tasks():
                    _log.info("%s", line)


def summary(document: Mapping[str, Any]) -> str:
    """Return one line with the most important values of a document of statistics."""
    disks = document["disks"]
    parts = [f"up {document['uptime_seconds']:.0f} s", f"disks {len(disks)}"]
    for operation in ("read", "write", "flush", "discard"):
        counted = [disk["requests"][operation] for disk in disks]
        requests = sum(one["requests"] for one in counted)
        mebibytes = sum(one["bytes"] for one in counted) / _MEBIBYTE
        seconds = sum(one["seconds"] for one in counted)
        average = f", {three_digits(seconds / requests * 1e3)} ms" if requests else ""
        parts.append(f"{operation} {requests} ({mebibytes:.1f} MiB{average})")
    errors = sum(one["errors"] for disk in disks for one in disk["requests"].values())
    parts.append(f"errors {errors}")
    dirty = sum(disk["table_cache"]["dirty_bytes"] for disk in disks)
    parts.append(f"dirty tables {dirty / _MEBIBYTE:.1f} MiB")
    parts.append(f"open handles {document['open_handles']}")
    parts.append(f"queued reads {document['queued_reads']}")
    parts += [f"{disk['image']} has failed" for disk in disks if disk["failure"] is not None]
    return f"{printable(document['mountpoint'])}: {'; '.join(parts)}"


def describe_tasks() -> Iterator[str]:
    """Yield a line for each task, up to `_MAX_TASKS`, and then a line with the number of all tasks.

    The line of a task has its name and its stack, the outermost frame first.
    """
    root = trio.lowlevel.current_root_task()
    unvisited = [] if root is None else [root]
    count = 0
    while unvisited:
        task = unvisited.pop()
        unvisited += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        count += 1
        if count <= _MAX_TASKS:
            yield f"task {task.name}: {' > '.join(_frames(task.coro)) or 'running'}"
    yield f"tasks: {count}"


def _frames(coroutine: Any) -> Iterator[str]:  # noqa: ANN401  a coroutine, generator or awaitable
    """Yield function, file and line of each frame, the outermost first.

    The source files are not read, because they may lie below the mountpoint.
    """
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is None:
            return
        name = os.path.basename(frame.f_code.co_filename)  # noqa: PTH119
        yield f"{frame.f_code.co_name} ({name}:{frame.f_lineno})"
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
