"""A small fleet: machines that start from one image on a server, and the requests that they make.

    python -m benchmarks.fleet                             100 machines, a disk of 64 MiB
    python -m benchmarks.fleet --machines 1000 --mib 16

All machines start at the same moment.  Each has a cache of its own, which is empty, and reads what
a scaled-down boot reads (`benchmarks.fleetload`); each byte is compared.  The servers are those of
the
tests: nginx, OpenStack Swift, and nginx behind the cache of ``examples/nginx-cache.conf``.  Their
logs are counted, and compared with the arithmetic.

The output is a table.  The exit code is 1 if a number of requests or bytes differs from the
arithmetic by more than 10 %, or if a byte was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.commands import BenchmarkError, run
from benchmarks.fleetload import (
    MIB,
    UNIT_BYTES,
    Cost,
    boot_reads,
    cost,
    file_reads,
    needed_requests,
)
from benchmarks.fleetprocess import finish, receive, send, started
from tests.support.nginx import Nginx, serving_cache, serving_nginx, why_no_nginx
from tests.support.swift import Swift, serving_swift, why_no_swift

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MAX_DIFFERENCE: Final = 0.1
_MACHINES_PER_PROCESS: Final = 10
_QUIET_SECONDS: Final = 1.0
"""After this time without an answer the machines have fetched all that they want."""
KEY: Final = "golden.qed"
BUCKET: Final = "golden"


class Golden(NamedTuple):
    """The image of the fleet.

    Attributes:
        image: The image's file.
        raw: A file with the content of its disk.
        reads: What each machine reads of the disk.
    """

    image: Path
    raw: Path
    reads: list[tuple[int, int]]


class Server(NamedTuple):
    """A server that has the image.

    Attributes:
        name: Its name in the table.
        url: The image's URL for the machines.
        environment: What the machines need to read it.
        answers: Returns how many answers the log has and how many bytes they had, apart from
            requests for the version only.
        expected: Returns what a number of machines must ask.
    """

    name: str
    url: str
    environment: Mapping[str, str]
    answers: Callable[[], Cost]
    expected: Callable[[int], Cost]


class Outcome(NamedTuple):
    """The requests of a fleet to a server, those that were expected, and the time in seconds."""

    found: Cost
    expected: Cost
    seconds: float

    @property
    def is_near(self) -> bool:
        """Return whether the numbers differ from the arithmetic by at most 10 %."""
        return all(
            abs(found - expected) <= MAX_DIFFERENCE * expected
            for found, expected in zip(self.found, self.expected, strict=True)
        )


def make_golden(directory: Path, mib: int) -> Golden:
    """Make an image with a disk of random bytes."""
    raw = directory / "golden.raw"
    raw.write_bytes(random.Random(1).randbytes(mib * MIB))
    image = directory / KEY
    run("qemu-img", "convert", "-O", "qed", str(raw), str(image), seconds=300)
    return Golden(image, raw, boot_reads(mib * MIB))


def nginx_server(nginx: Nginx, golden: Golden) -> Server:
    """Serve the image by nginx."""
    _publish(nginx, golden)
    return Server(
        "nginx",
        f"{nginx.http}/{KEY}",
        {},
        lambda: _count(_partial(nginx)),
        lambda machines: _times(machines, _one(golden)),
    )


def cached_server(nginx: Nginx, cache: tuple[str, Path], golden: Golden) -> Server:
    """Serve the image by a cache, and count what reaches the nginx behind it."""
    _publish(nginx, golden)
    return Server(
        "nginx behind the cache",
        f"{cache[0]}/{KEY}",
        {"SSL_CERT_FILE": str(cache[1])},
        lambda: _count(_partial(nginx)),
        lambda _machines: cost(_slices(golden), golden.image.stat().st_size, MIB),
    )


def swift_server(swift: Swift, golden: Golden) -> Server:
    """Serve the image by Swift."""
    swift.put(BUCKET, KEY, golden.image.read_bytes())
    return Server(
        "Swift",
        f"s3://{BUCKET}/{KEY}",
        swift.variables,
        lambda: _count(swift.answers(BUCKET, KEY)),
        lambda machines: _times(machines, _one(golden)),
    )


def measure(server: Server, golden: Golden, machines: int) -> Outcome:
    """Start a fleet; return what it has asked of a server.

    Raises:
        WrongDataError: A machine has read a wrong byte.
        BenchmarkError: A machine could not read.
    """
    expected = server.expected(machines)
    before = server.answers()
    with ExitStack() as stack:
        caches = tempfile.mkdtemp(dir=golden.image.parent, prefix="caches-")
        stack.callback(shutil.rmtree, caches, ignore_errors=True)
        processes = []
        for first in range(0, machines, _MACHINES_PER_PROCESS):
            number = min(_MACHINES_PER_PROCESS, machines - first)
            words = (server.url, str(golden.raw), f"{caches}/{first}", str(number))
            processes.append(stack.enter_context(started(words, server.environment)))
        receive(processes)  # all are ready
        begin = time.monotonic()
        send(processes)
        receive(processes)  # all have read
        seconds = time.monotonic() - begin
        _wait_for_answers(server, before.requests + expected.requests)
        send(processes)
        for process in processes:
            finish(process, server.name)
    after = server.answers()
    found = Cost(after.requests - before.requests, after.bytes - before.bytes)
    return Outcome(found, expected, seconds)


def _wait_for_answers(server: Server, number: int) -> None:
    """Wait for the answers to what is fetched ahead, until no further ones come."""
    found = -1
    while (now := server.answers().requests) != found and now < number:
        found = now
        time.sleep(_QUIET_SECONDS)


def _publish(nginx: Nginx, golden: Golden) -> None:
    target = nginx.directory / KEY
    shutil.copyfile(golden.image, target)
    # An old time of change, because a client waits before it uses a version that has just changed.
    os.utime(target, (1_000_000_000, 1_000_000_000))


def _requests(golden: Golden) -> list[range]:
    """Return the units of each request of one machine."""
    image = golden.image.read_bytes()
    return needed_requests(file_reads(image, golden.reads), len(image))


def _one(golden: Golden) -> Cost:
    """Return what one machine asks."""
    return cost(_requests(golden), golden.image.stat().st_size)


def _slices(golden: Golden) -> list[range]:
    """Return the slices of 1 MiB that a cache fetches, each with a request of its own."""
    units = {unit for request in _requests(golden) for unit in request}
    return [range(number, number + 1) for number in {unit * UNIT_BYTES // MIB for unit in units}]


def _times(machines: int, one: Cost) -> Cost:
    return Cost(machines * one.requests, machines * one.bytes)


def _count(sizes: list[int]) -> Cost:
    """Return the sum for answers of some lengths; one byte answers a request for the version."""
    data = [size for size in sizes if size > 1]
    return Cost(len(data), sum(data))


def _partial(nginx: Nginx) -> list[int]:
    """Return the length of each answer of nginx that has a range of the image."""
    return [
        size for status, size in nginx.requests(f"/{KEY}") if status == HTTPStatus.PARTIAL_CONTENT
    ]


def main() -> int:
    """Measure, and print a table; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--machines", type=int, default=100)
    parser.add_argument("--mib", type=int, default=64, help="size of the disk (default 64)")
    options = parser.parse_args()
    if reason := why_no_nginx() or why_no_swift():
        print(f"fleet: {reason}", file=sys.stderr)
        return 1
    print(f"{options.machines} machines, a disk of {options.mib} MiB\n")
    print("| server | requests | expected | MiB | expected | seconds | |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    is_near = True
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-")))
        golden = make_golden(directory, options.mib)
        nginx = stack.enter_context(serving_nginx(directory / "nginx"))
        swift = stack.enter_context(serving_swift(directory / "swift"))
        swift.make_bucket(BUCKET)
        cache = stack.enter_context(serving_cache(directory / "cache", nginx))
        for server in (
            nginx_server(nginx, golden),
            swift_server(swift, golden),
            cached_server(nginx, cache, golden),
        ):
            outcome = measure(server, golden, options.machines)
            found, expected = outcome.found, outcome.expected
            print(
                f"| {server.name} | {found.requests} | {expected.requests} "
                f"| {found.bytes / MIB:.0f} | {expected.bytes / MIB:.0f} "
                f"| {outcome.seconds:.0f} | {'' if outcome.is_near else 'differs'} |",
                flush=True,
            )
            is_near = is_near and outcome.is_near
    return 0 if is_near else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"fleet: {error}", file=sys.stderr)
        sys.exit(1)
