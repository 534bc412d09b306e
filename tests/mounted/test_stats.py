"""``qedfuse stats``: what it prints about mounts, for whom, and what it does without an answer."""

from __future__ import annotations

import errno
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import pytest

from qedfuse.cli.qedfuse import stats
from qedfuse.cli.qedfuse.main import main
from qedfuse.cli.qedfuse.statstable import StdoutConsole
from qedfuse.errors import HostError
from qedfuse.hostio.systemcalls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, fallocate
from qedfuse.mount.commands import statistics
from qedfuse.mount.commands.statistics import NoStatisticsError, read_statistics
from qedfuse.mount.system import statisticssocket
from qedfuse.mount.system.mounttable import FUSE_TYPE, find_mount
from qedfuse.mount.system.recorddirectory import STATISTICS_SUFFIX
from qedfuse.mount.system.recordlookup import FoundRecord, find_record
from tests.support import extensions, qemu
from tests.support.mounted import KEEPS_NEED_CHECK, front, mounted, qedfuse, without_notice
from tests.support.programs import environment
from tests.support.users import AS_USER, USER_ID, as_user, user_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

CLUSTER: Final = 65536
DISK_BYTES: Final = 64 * CLUSTER


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Make an empty image."""
    path = tmp_path / "disk.qed"
    qemu.create(path, DISK_BYTES)
    return path


def statistics_of(mountpoint: Path) -> dict[str, Any]:
    """Return what ``qedfuse stats --output=json`` prints about one mount."""
    done = qedfuse("stats", "--output=json", mountpoint)
    assert (done.returncode, done.stderr) == (0, ""), done
    printed = json.loads(done.stdout)
    (document,) = printed["mounts"]
    assert printed["version"] == document["version"] == 1
    assert document["mountpoint"] == str(mountpoint)
    found: dict[str, Any] = document
    return found


def socket_of(mountpoint: Path) -> Path:
    """Return the path of the socket of a mount of this user."""
    entry = find_mount(str(mountpoint))
    assert entry is not None
    found = find_record(entry.device, os.geteuid())
    assert found is not None
    return found.path.with_name(found.path.name + STATISTICS_SUFFIX)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a disk for reading and writing with O_DIRECT in the block."""
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        yield fd
    finally:
        os.close(fd)


def transfer(fd: int, offset: int, data: bytes | int) -> None:
    """Write data, or read a number of bytes, with O_DIRECT, so that one request is sent."""
    with mmap.mmap(-1, data if isinstance(data, int) else len(data)) as buffer:
        if isinstance(data, int):
            assert os.preadv(fd, [buffer], offset) == data
        else:
            buffer[:] = data
            assert os.pwritev(fd, [buffer], offset) == len(data)


def test_each_request_is_counted_once(image: Path, mnt: Path) -> None:
    """Reads, writes, flushes and discards, by every path, are counted with their bytes."""
    with mounted(image, mnt, prelude=KEEPS_NEED_CHECK):
        with opened(mnt / "disk.raw") as fd:
            for number in range(40):
                transfer(fd, number * 4096, bytes([1 + number]) * 4096)
            transfer(fd, 0, b"a" * (2 * CLUSTER))
            for number in range(50):
                transfer(fd, number * 512, 4096)
            transfer(fd, CLUSTER, 4 * CLUSTER)
            os.fsync(fd)
            os.fsync(fd)
            if extensions.EXPECTED:  # without the extension there is no fallocate
                fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, CLUSTER, CLUSTER)
        (disk,) = statistics_of(mnt)["disks"]
        requests = disk["requests"]
        assert requests["read"]["requests"] == 51
        assert requests["read"]["bytes"] == 50 * 4096 + 4 * CLUSTER
        assert requests["write"]["requests"] == 41
        assert requests["write"]["bytes"] == 40 * 4096 + 2 * CLUSTER
        assert requests["flush"]["requests"] >= 2
        discards = int(extensions.EXPECTED)
        assert requests["discard"]["requests"] == discards
        assert requests["discard"]["bytes"] == discards * CLUSTER
        for counted in requests.values():
            assert sum(counted["histogram"]) == counted["requests"]
            assert counted["errors"] == 0
            assert counted["fast"] <= counted["requests"]
            assert (counted["seconds"] > 0) == (counted["requests"] > 0)
        assert disk["space"]["allocated_clusters"] > 2
        assert 0 < disk["space"]["file_bytes"] <= disk["space"]["bound_bytes"]
        assert disk["files"][0]["bytes"] >= 50 * 4096
        assert disk["hit_rates"]["fast_path"] > 0
        assert disk["files"][0]["table_loads"] >= disk["table_cache"]["loads"] > 0
        assert disk["need_check"] is True
        assert disk["open_handles"] == 0


def test_a_read_is_not_longer_than_a_reply_that_can_be_spliced(image: Path, mnt: Path) -> None:
    """The kernel sends two requests for a read of 1 MiB, and one for such a write."""
    with mounted(image, mnt, prelude=KEEPS_NEED_CHECK):
        with opened(mnt / "disk.raw") as fd:
            transfer(fd, 0, b"w" * (1 << 20))
            transfer(fd, 0, 1 << 20)
        (disk,) = statistics_of(mnt)["disks"]
        mounts = [
            line for line in Path("/proc/mounts").read_text().splitlines() if str(mnt) in line
        ]
    counts = [disk["requests"][name]["requests"] for name in ("write", "read")]
    assert counts == ([1, 2] if extensions.EXPECTED else [1, 1])
    assert ["max_read=524288" in line for line in mounts] == [extensions.EXPECTED]


def test_the_output_names_everything(image: Path, mnt: Path) -> None:
    """Text and Prometheus' format have the values of the document; without a mountpoint as well."""
    with mounted(image, mnt):
        with opened(mnt / "disk.raw") as fd:
            transfer(fd, 0, b"a" * 4096)
            transfer(fd, 0, 4096)
        text = qedfuse("stats", mnt).stdout
        assert f"{mnt}: process " in text
        assert f"disk.raw: {image}, 4.0 MiB, writable, open handles: 0" in text
        for line in ("read ", "write ", "flush ", "discard ", "hits %", "space ", "chain "):
            assert f"\n    {line}" in text, line
        metrics = qedfuse("stats", "--output=prometheus", mnt).stdout
        labels = f'mountpoint="{mnt}",disk="disk.raw",operation="write"'
        assert f"qedfuse_requests_total{{{labels}}} 1\n" in metrics
        assert f'qedfuse_request_duration_seconds_bucket{{{labels},le="+Inf"}} 1\n' in metrics
        assert f"{mnt}: process " in qedfuse("stats").stdout, "all mounts of the user"


def test_watching_prints_every_second_until_the_mount_has_gone(image: Path, mnt: Path) -> None:
    """The first table is about the time since the mount began; the end of the mount ends it."""
    with mounted(image, mnt):
        watching = subprocess.Popen(
            [sys.executable, "-m", "qedfuse", "stats", "--watch", mnt],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert watching.stdout is not None
        lines = [watching.stdout.readline() for _ in range(6)]
    _out, error = watching.communicate(timeout=60)
    assert lines[0].startswith(f"{mnt}: process ")
    assert lines[1].split()[:4] == ["disk", "r/s", "rMB/s", "r_await"]
    assert lines[2].startswith(f"{mnt}/disk.raw")
    assert lines[3].split()[:3] == ["disk", "file", "%bound"]
    assert lines[5].startswith(f"{mnt}: process "), "the next second begins"
    assert watching.returncode in {18, 32}
    assert error.startswith(f"qedfuse: {mnt}: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--watch"], "table_loads"),
        ([], "resident_bytes"),
        (["--output", "prometheus"], "uptime_seconds"),
    ],
)
def test_a_server_of_another_version(
    image: Path,
    mnt: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    field: str,
) -> None:
    """A field that is missing is named in one line; JSON has the other fields."""
    with mounted(image, mnt):
        text = json.dumps(read_statistics(str(mnt)))
    assert f'"{field}"' in text
    text = text.replace(f'"{field}"', '"new"')
    monkeypatch.setattr(stats, "read_statistics", lambda _: json.loads(text))
    monkeypatch.setattr(stats, "_INTERVAL_SECONDS", 0)
    assert main(["stats", *words, str(mnt)]) == 32
    assert capsys.readouterr().err == (
        f"qedfuse: {mnt}: statistics: found no field {field}, expected one (the mount runs another "
        "version of qedfuse; --output json prints what there is)\n"
    )
    assert main(["stats", "--output", "json", str(mnt)]) == 0
    assert json.loads(capsys.readouterr().out)["mounts"] == [json.loads(text)]


@pytest.mark.parametrize(
    ("version", "shown"),
    [(7, "7"), ("x" * 70_000, "another kind of value"), (10**4000, f"1{'0' * 99}...")],
)
def test_a_document_of_an_unknown_version(
    mnt: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: object,
    shown: str,
) -> None:
    """The message shows the version that a server states, and not any other text of the server."""
    answer = statistics._Answer(str(mnt), json.dumps({"version": version}).encode())
    monkeypatch.setattr(statistics, "call_in_child", lambda *_arguments: answer)
    assert main(["stats", str(mnt)]) != 0
    assert capsys.readouterr().err == (
        f"qedfuse: {mnt}: statistics: version: found {shown}, expected 1\n"
    )


def test_a_server_with_impossible_values(
    image: Path, mnt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A value of another type, or out of range, makes one line for each kind of output."""
    with mounted(image, mnt):
        document = read_statistics(str(mnt))
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(stats, "read_statistics", lambda _: found[-1])
    for field, value in (
        ("disks", "x"),
        ("disks", [1]),
        ("disks", 1),
        ("resident_bytes", "x"),
        ("resident_bytes", 10**400),
        ("uptime_seconds", []),
    ):
        found.append({**document, field: value})
        outputs = ["human", "prometheus"] if field == "disks" else ["human"]
        for output in outputs:
            assert main(["stats", "--output", output, str(mnt)]) == 32, (field, value, output)
            assert capsys.readouterr().err == (
                f"qedfuse: {mnt}: statistics: found an impossible value in a field, expected one "
                "of this version (--output json prints what there is)\n"
            )
        assert main(["stats", "--output", "json", str(mnt)]) == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    ("field", "value"),
    [("disks", "x"), ("disks", [1]), ("pid", json.loads("[" * 900 + "]" * 900))],
    ids=["type", "list", "depth"],
)
@pytest.mark.parametrize("output", ["human", "prometheus", "json"])
def test_one_bad_server_does_not_hide_the_other_mounts(
    image: Path,
    mnt: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    output: str,
    field: str,
    value: object,
) -> None:
    """Without a path, the statistics of all other mounts are printed, and a line names the bad one.

    An output that can show the bad value, or does not have it, shows both mounts.
    """
    with mounted(image, mnt):
        document = read_statistics(str(mnt))
    good, bad = str(mnt), "/mnt/bad"
    documents = {good: document, bad: {**document, "mountpoint": bad, field: value}}
    monkeypatch.setattr(stats, "mountpoints_to_ask", lambda _: [bad, good])
    monkeypatch.setattr(stats, "read_statistics", documents.__getitem__)
    code = main(["stats", "--output", output])
    out, error = capsys.readouterr()
    assert good in out
    if not error:
        assert code == 0
        assert bad in out
        assert (output, field) in {("json", "disks"), ("json", "pid"), ("prometheus", "pid")}
    else:
        assert code == 32
        assert error.startswith(f"qedfuse: {bad}: statistics: found ")
        assert error.count("\n") == 1
        assert bad not in out


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("lines", [0, 2])
def test_the_reader_of_the_tables_may_go(
    image: Path, mnt: Path, *, terminal: bool, lines: int
) -> None:
    """A closed pipe ends the command without a message and with 0, as it ends the help."""
    with mounted(image, mnt):
        watching = subprocess.Popen(
            [sys.executable, "-m", "qedfuse", "stats", "--watch", mnt],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment(), **({"FORCE_COLOR": "1"} if terminal else {})},
        )  # fmt: skip
        assert watching.stdout is not None
        found = "".join(watching.stdout.readline() for _ in range(lines))
        assert ("\033[?25l" in found) == (terminal and lines > 0), "it hides the cursor"
        watching.stdout.close()
        watching.stdout = None
        _out, error = watching.communicate(timeout=60)
    assert (watching.returncode, error) == (0, "")


@pytest.mark.parametrize("ends", [KeyboardInterrupt, BrokenPipeError, NoStatisticsError])
def test_a_closed_pipe_does_not_hide_why_the_display_ends(
    ends: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C the command ends as after Ctrl-C, even if the cursor cannot be shown again."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    reading, writing = os.pipe()
    with open(writing, "w", encoding="utf-8") as stdout:  # noqa: PTH123  a descriptor, not a name
        monkeypatch.setattr(sys, "stdout", stdout)
        console = StdoutConsole()
        assert console.is_terminal
        with pytest.raises(ends), stats._live(console):  # noqa: PT012  the end of the block fails
            assert os.read(reading, 100), "it hides the cursor"
            os.close(reading)
            raise ends
        stdout.flush()  # what could not be written was dropped


def test_a_document_cannot_control_the_terminal(
    image: Path, mnt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No text of a server reaches the terminal unescaped, and none is taken for markup."""
    evil, markup = "\033]0;x\007\n", "[/bold]:smile:"
    with mounted(image, mnt):
        document = read_statistics(str(mnt))
    disk = document["disks"][0]
    disk.update(name=markup, image=evil, failure=evil, scan={**disk["scan"], "state": evil})
    disk["files"][0].update(name=evil, format=evil)
    document.update(
        pid=evil, qedfuse=evil, sandbox={"mode": evil, "in_force": [evil], "missing": [evil]}
    )
    monkeypatch.setattr(stats, "read_statistics", lambda _: document)
    assert main(["stats", str(mnt)]) == 0
    text = capsys.readouterr().out
    assert f"  {markup}: " in text
    assert text.count(r"\x1b]0;x\x07\n") == 9

    monkeypatch.setattr(stats, "_every_second", lambda *_: iter([[document]]))
    assert main(["stats", "--watch", str(mnt)]) == 0
    table = capsys.readouterr().out
    assert f"{mnt}/{markup} " in table
    assert table.count(r"\x1b]0;x\x07\n") == 2
    assert main(["stats", "--output", "prometheus", str(mnt)]) == 0
    metrics = capsys.readouterr().out
    for printed in text, table, metrics:
        assert printed.replace("\n", "").isprintable()


def test_only_a_failed_write_names_standard_output(
    image: Path, mnt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full stdout is named; an error while the statistics are read is not taken for one."""
    with mounted(image, mnt):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "qedfuse", "stats", mnt],
                check=False, stdout=full, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert done.stderr == "qedfuse: standard output: No space left on device\n"
        assert done.returncode == 2

        # On a terminal, the live display writes when it begins, before any table.
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "qedfuse", "stats", "--watch", mnt],
                check=False, stdout=full, stderr=subprocess.PIPE, text=True,
                env={**environment(), "FORCE_COLOR": "1"},
            )  # fmt: skip
        assert done.stderr == "qedfuse: standard output: No space left on device\n"
        assert done.returncode == 2

        def fail(_path: str) -> NoReturn:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(stats, "read_statistics", fail)
        main(["stats", str(mnt)])
    error = capsys.readouterr().err
    assert "Input/output error" in error
    assert "standard output" not in error


def test_silent_clients_stop_neither_the_mount_nor_others(image: Path, mnt: Path) -> None:
    """Clients that neither read nor close leave the mount and other clients served."""
    with mounted(image, mnt):
        path = socket_of(mnt)
        assert path.stat().st_mode & 0o777 == 0o600
        with ExitStack() as stack:
            for _ in range(4):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.connect(str(path))
            assert statistics_of(mnt)["disks"][0]["name"] == "disk.raw"
            with opened(mnt / "disk.raw") as fd:
                transfer(fd, 0, b"a" * 4096)
    assert not path.exists(), "removed with the record"


def test_a_stopped_server_is_reported_in_time(image: Path, tmp_path: Path) -> None:
    """If the process does not answer, the error comes after the time limit, with exit code 32."""
    with front(image, tmp_path / "mnt") as mount:
        mount.signal(signal.SIGSTOP)
        try:
            with pytest.raises(NoStatisticsError, match=r"does not answer \(waited 0.2 s\)"):
                read_statistics(str(mount.mountpoint), 0.2)
        finally:
            mount.signal(signal.SIGCONT)
        assert NoStatisticsError.exit_code == 32
        assert read_statistics(str(mount.mountpoint))["disks"]


def test_a_killed_server_leaves_no_socket(image: Path, tmp_path: Path) -> None:
    """After kill -9 the command says that the process has ended; umount removes the socket."""
    with front(image, tmp_path / "mnt") as mount:
        path = socket_of(mount.mountpoint)
        mount.process.kill()
        mount.process.wait()
        done = qedfuse("stats", mount.mountpoint)
        assert done.returncode == 32
        assert done.stderr == (
            f"qedfuse: {mount.mountpoint}: no statistics: process {mount.process.pid}, which "
            "serves the mount, has ended\n"
        )
        assert path.exists()
        qedfuse("umount", mount.mountpoint)
        assert not path.exists()


def test_the_next_mount_removes_the_socket_of_a_killed_server(image: Path, tmp_path: Path) -> None:
    """A socket whose server was killed is removed although its record is kept for a while."""
    with front(image, tmp_path / "mnt") as mount:
        path = socket_of(mount.mountpoint)
        mount.process.kill()
        mount.process.wait()
    other = tmp_path / "other.qed"
    qemu.create(other, DISK_BYTES)
    with mounted(other, tmp_path / "other"):
        assert not path.exists()
        assert socket_of(tmp_path / "other").exists()


@contextmanager
def in_place_of_the_server(path: Path, user: int) -> Iterator[socket.socket]:
    """Listen as a user on a socket in place of that of a server."""
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        own = os.geteuid()
        os.seteuid(user)
        try:
            listener.listen()
        finally:
            os.seteuid(own)
        yield listener


@pytest.mark.parametrize(
    ("user", "found"),
    [
        pytest.param(
            USER_ID,
            f": found a server of user {USER_ID} at its socket, expected one of user 0",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs another user"),
        ),
        (os.geteuid(), ", has closed the connection without an answer"),
    ],
    ids=["another-user", "silent"],
)
def test_why_the_server_has_no_answer(user: int, found: str, image: Path, tmp_path: Path) -> None:
    """A socket of another user and a server that sends nothing have messages of their own."""
    with (
        front(image, tmp_path / "mnt") as mount,
        in_place_of_the_server(socket_of(mount.mountpoint), user) as listener,
    ):
        asking = subprocess.Popen(
            [sys.executable, "-m", "qedfuse", "stats", mount.mountpoint],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        listener.accept()[0].close()
        _out, error = asking.communicate(timeout=60)
        assert asking.returncode == 32
        assert error == (
            f"qedfuse: {mount.mountpoint}: no statistics: process {mount.process.pid}, which "
            f"serves the mount{found}\n"
        )


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ("vanishes", "no statistics: found no record of the process that serves the mount"),
        (
            "is open to others",
            "no statistics: found no record of the process that serves the mount",
        ),
        ("is unreadable", "cannot read the mount record: Too many open files"),
    ],
)
def test_a_directory_that_changes_after_the_lookup(
    moment: str, message: str, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the directory of records changes between lookup and use, the error is one line."""
    directory = tmp_path / "records"

    def find_and_change(device: str, user: int) -> FoundRecord:
        """Find the record, and return it as one in a directory that changes right after."""
        found = find_record(device, user)
        assert found is not None
        if moment == "is open to others":
            directory.mkdir()
            directory.chmod(0o777)
        elif moment == "is unreadable":
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # in the child that asks
        return FoundRecord(directory / found.path.name, found.record)

    monkeypatch.setattr(statistics, "find_record", find_and_change)
    with front(image, tmp_path / "mnt") as mount:
        with pytest.raises((NoStatisticsError, HostError), match=message) as caught:
            read_statistics(str(mount.mountpoint))
        assert "\n" not in str(caught.value)


def test_a_document_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client reads no more than the maximum, and names it."""
    monkeypatch.setattr(statisticssocket, "_MAX_DOCUMENT_BYTES", 1000)
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with statisticssocket.listen(directory, "stats") as listener, ThreadPoolExecutor() as pool:
            listener.setblocking(True)  # noqa: FBT003  its only parameter
            for length in (1000, 1001):
                user = (os.geteuid(),)
                answer = pool.submit(statisticssocket.receive, directory, "stats", user)
                with listener.accept()[0] as server:
                    server.sendall(b"x" * length)
                if length == 1000:
                    assert len(answer.result()) == 1000
                else:
                    with pytest.raises(
                        statisticssocket.UnusableServerError,
                        match="found a document of more than 1000 bytes",
                    ):
                        answer.result()
    finally:
        os.close(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_only_the_owner_and_root_may_ask(image: Path, mnt: Path) -> None:
    """Root reads the statistics of a user's mount; the user does not read those of root's."""
    with user_directory() as directory:
        theirs = directory / "disk.qed"
        qemu.create(theirs, DISK_BYTES)
        theirs.chmod(0o666)
        command = (sys.executable, "-m", "qedfuse")
        assert as_user(*command, theirs, directory / "mnt").returncode == 0
        done = as_user(*command, "stats", "--output=json", directory / "mnt")
        assert json.loads(done.stdout)["mounts"][0]["mountpoint"] == str(directory / "mnt")
        assert statistics_of(directory / "mnt")["disks"][0]["name"] == "disk.raw"
        with mounted(image, mnt):
            done = as_user(*command, "stats", mnt)
            assert done.returncode in {18, 19}, done
            listed = as_user(*command, "stats", "--output=json")
            points = [one["mountpoint"] for one in json.loads(listed.stdout)["mounts"]]
            assert str(directory / "mnt") in points
            assert str(mnt) not in points
        assert as_user(*command, "umount", directory / "mnt").returncode == 0


def test_a_path_without_a_mount_is_refused(tmp_path: Path) -> None:
    """A path where nothing is mounted is one line, with the code of mountpoints."""
    done = qedfuse("stats", tmp_path)
    assert done.returncode == 18
    assert done.stderr == (f"qedfuse: {tmp_path}: found no mount, expected a mount of qedfuse\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a mount namespace and another user")
@pytest.mark.parametrize("user", [0, USER_ID])
def test_no_mount_at_all(user: int) -> None:
    """Without a mount, the message names the user whose mounts count; root may ask all."""
    detach = f"umount --all --lazy --types {FUSE_TYPE}"
    command = [*AS_USER] if user else []
    command += [sys.executable, "-m", "qedfuse", "stats"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{detach}; exec "$@"', "sh", *command],
        capture_output=True, text=True, timeout=60, check=False, cwd="/", env=environment(),
    )  # fmt: skip
    whose = f" of user {user}" if user else ""
    assert (done.returncode, without_notice(done.stderr)) == (
        18, f"qedfuse: stats: found no mount of qedfuse{whose}, expected at least one\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output=xml",), "option --output: found xml, expected human or json or prometheus"),
        (("a", "b"), "stats: found 2 mountpoints, expected at most one (see: qedfuse --help)"),
        (("--watch", "--output=prometheus"),
         "options --watch and --output=prometheus exclude each other"),
    ],
    ids=["output", "mountpoints", "watch"],
)  # fmt: skip
def test_wrong_arguments_are_refused(words: tuple[str, ...], message: str) -> None:
    """A wrong argument is one line with exit code 1."""
    done = qedfuse("stats", *words)
    assert (done.returncode, done.stderr) == (1, f"qedfuse: {message}\n")
