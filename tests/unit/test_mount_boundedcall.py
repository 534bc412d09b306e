"""Calls in a child process that the caller abandons after a time limit."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from qedfuse.errors import HostError
from qedfuse.mount.system.boundedcall import call_in_child
from qedfuse.util.descriptors import open_descriptors


def test_the_child_keeps_nothing_of_its_caller_open() -> None:
    """A child that blocks in the kernel keeps no descriptor of its caller open."""
    reading, writing = os.pipe()
    found = call_in_child(open_descriptors, 30)
    assert {reading, writing} & found == set()
    assert len(found) == 4  # the standard ones, and the way back
    assert call_in_child(lambda: str(Path("/proc/self/fd/1").readlink()), 30) == "/dev/null"
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    ("refused", "number"), [("pipe", errno.EMFILE), ("fork", errno.EAGAIN)], ids=["pipe", "fork"]
)
def test_a_child_that_cannot_be_made_is_an_error_of_the_host(
    refused: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a pipe or a process, the error is one line, and no descriptor stays open."""

    def refuse() -> None:
        raise OSError(number, os.strerror(number))

    before = open_descriptors()
    monkeypatch.setattr(os, refused, refuse)
    with pytest.raises(HostError) as caught:
        call_in_child(os.getpid, 30)
    assert str(caught.value) == f"child process: cannot start: {os.strerror(number)}"
    assert open_descriptors() == before


def test_a_program_that_ignores_sigchld_gets_the_result() -> None:
    """The result arrives although the kernel keeps no exit code of the child."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert call_in_child(lambda: 7, 30) == 7
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_child_without_a_result_is_an_error_of_the_host() -> None:
    """If the child is killed, or its result cannot be pickled, the error is one line."""
    for function in (lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: lambda: None):
        with pytest.raises(HostError, match=r"^child process: ended without a result"):
            call_in_child(function, 30)
