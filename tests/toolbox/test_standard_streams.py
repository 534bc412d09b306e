"""``-`` as a disk: standard streams that are files, sockets or closed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from qedfuse.tools.common.pipe import open_stream

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = (sys.executable, "-m", "qedfuse.cli.qedimg")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Give a raw disk."""
    path = tmp_path / "a.raw"
    path.write_bytes(os.urandom(3 << 19) + bytes(3 << 20) + os.urandom(512))
    return path


@pytest.mark.parametrize("flags", [os.O_APPEND, 0])
def test_a_file_is_written_from_its_position(flags: int, raw: Path, tmp_path: Path) -> None:
    """Output begins at the file's position, after what others wrote."""
    out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT | flags)
    try:
        os.write(out, b"header\n")
        command = [*PROGRAM, "convert", "-O", "raw", str(raw), "-"]
        subprocess.run(command, stdout=out, check=True)
        os.write(out, b"trailer\n")
    finally:
        os.close(out)
    assert (tmp_path / "out").read_bytes() == b"header\n" + raw.read_bytes() + b"trailer\n"


def test_a_file_is_read_from_its_position(raw: Path, tmp_path: Path) -> None:
    """Input begins at the file's position, after what others read."""
    with raw.open("rb", buffering=0) as file:
        file.seek(512)
        command = [*PROGRAM, "convert", "-O", "raw", "-", str(tmp_path / "new.raw")]
        subprocess.run(command, stdin=file, check=True)
    assert (tmp_path / "new.raw").read_bytes() == raw.read_bytes()[512:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("way", ["reading", "writing"])
def test_waiting_for_a_socket_can_be_ended(
    way: str, number: signal.Signals, raw: Path, tmp_path: Path
) -> None:
    """A signal ends the wait for a socket, which cannot be reopened like a pipe."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if way == "reading":
            words = ["-", str(tmp_path / "new.qed")]
            ours.sendall(bytes(100_000))
        else:
            words = ["-O", "raw", str(raw), "-"]
        end = theirs.fileno()
        process = subprocess.Popen(
            [*PROGRAM, "convert", *words], stdin=end, stdout=end, stderr=subprocess.PIPE
        )
        if way == "reading":
            # The temporary file exists before anything is read.
            while os.listdir(tmp_path) == ["a.raw"]:  # noqa: PTH208  names
                assert process.poll() is None
        else:
            assert ours.recv(1)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == b"qedimg: interrupted\n"
    assert os.listdir(tmp_path) == ["a.raw"]  # noqa: PTH208  names


@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_WRONLY])
def test_a_socket_that_does_not_block_is_waited_for(access: int) -> None:
    """A standard stream that was inherited with O_NONBLOCK is waited for."""
    ours, theirs = socket.socketpair()
    number = access  # descriptor 0 is read, and 1 is written
    saved = os.dup(number)
    content = os.urandom(3 << 20)  # more than the buffer of a socket holds
    seen = bytearray()

    async def transfer() -> None:
        stream = await open_stream("-", access)
        try:
            if access == os.O_WRONLY:
                await stream.write(memoryview(content))
            else:
                buffer = bytearray(1 << 16)
                while count := await stream.read(memoryview(buffer)):
                    seen.extend(buffer[:count])
        finally:
            stream.close()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer)
            # A call in a thread that finds nothing to do would end within the cushion.
            await trio.testing.wait_all_tasks_blocked(cushion=0.05)
            peer = trio.socket.from_stdlib_socket(ours)
            if access == os.O_WRONLY:
                while len(seen) < len(content):
                    seen.extend(await peer.recv(1 << 16))
            else:
                await trio.SocketStream(peer).send_all(content)
                peer.shutdown(socket.SHUT_WR)

    with ours, theirs:
        theirs.settimeout(0)
        ours.settimeout(0)
        os.dup2(theirs.fileno(), number)
        try:
            trio.run(main)
        finally:
            os.dup2(saved, number)
            os.close(saved)
    assert bytes(seen) == content


@pytest.mark.parametrize(
    ("words", "closed", "code"),
    [
        ("convert -O raw RAW -", 1, 1),
        ("convert -O raw - NEW", 0, 1),
        ("compare RAW RAW", 1, 2),
        ("info -f raw RAW", 1, 1),
    ],
)
def test_closed_streams_are_failures(
    words: str, closed: int, code: int, raw: Path, tmp_path: Path
) -> None:
    """A closed standard stream exits with the command's code for failures."""
    paths = {"RAW": str(raw), "NEW": str(tmp_path / "new.raw")}
    command = [*PROGRAM, *(paths.get(word, word) for word in words.split())]
    shell = ["sh", "-c", f'exec "$@" {closed}{"<" if not closed else ">"}&-', "sh", *command]
    done = subprocess.run(shell, stderr=subprocess.PIPE, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.count(b"\n") == 1
    assert b"Bad file descriptor" in done.stderr
    assert os.listdir(tmp_path) == ["a.raw"]  # noqa: PTH208  names
