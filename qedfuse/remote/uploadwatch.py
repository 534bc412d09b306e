"""Noticing during an upload that the store does not answer any more.

obstore stores a part with one call, which may take many minutes on a slow line.  So if no part has
begun for some time, a request for the object's metadata (HEAD) shows whether the store still
answers.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NoReturn

import trio

from qedfuse.errors import HostError, RemoteError
from qedfuse.remote.client import (
    AttemptError,
    ChangedError,
    MissingError,
    RefusedError,
    UnusableError,
)
from qedfuse.remote.object import make_client
from qedfuse.util.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from qedfuse.remote.address import Address
    from qedfuse.remote.client import Client, ClientOptions
    from qedfuse.remote.options import Deadlines

_log = logging.getLogger(__name__)


async def watch_store(
    address: Address,
    options: ClientOptions,
    deadlines: Deadlines,
    position: Callable[[], int],
) -> NoReturn:
    """Raise RemoteError when a store has not answered for the total time of ``deadlines``.

    While the upload makes progress, no request is sent.  The beginning and the end of an outage
    are logged.

    Args:
        address: The address of the object that is stored.
        options: How to connect, and the time limit of a request.
        deadlines: After ``attempt_seconds`` without progress, a request is sent.  After
            ``total_seconds`` without an answer, the call fails.
        position: Returns a number that changes when the upload makes progress.
    """
    client = make_client(address, options)
    seconds = deadlines.total_seconds
    begin: float | None = None  # of the outage
    while True:
        before = position()
        await trio.sleep(deadlines.attempt_seconds)
        reason = None
        if position() == before:
            try:
                reason = await run_in_thread(_ask, client, abandon_on_cancel=True)
            except HostError:
                continue  # no thread can be started now, so the state of the store is unknown
        if reason is None:
            if begin is not None:
                _log.warning("%s: the store answers again", address.shown)
            begin = None
            continue
        now = trio.current_time()
        if begin is None:
            begin = now
            _log.warning(
                "%s: %s; the upload waits for the store for at most %g s",
                *(address.shown, reason, seconds),
            )
        if now - begin >= seconds:
            msg = f"{address.shown}: {reason} (for {seconds:g} s)"
            raise RemoteError(msg)


def _ask(client: Client) -> str | None:
    """Request the object's metadata; return the reason if the store does not answer, else None.

    A failure that a mere retry may overcome, such as HTTP status 503 or 429, counts as no answer.
    A refusal of the credentials is an answer.
    """
    try:
        client.head()
    except (RefusedError, MissingError, ChangedError, UnusableError):
        return None
    except AttemptError as error:
        return str(error)
    return None
