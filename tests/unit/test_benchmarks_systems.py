"""What the benchmarks start and read: commands, versions, CPU times and fio's results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from benchmarks import loads, machine, pagecache
from benchmarks.commands import BenchmarkError
from benchmarks.cputime import CpuTime, cpu_time, parse_stat
from benchmarks.peerroot import storage_daemon
from benchmarks.systems import Programs, service

if TYPE_CHECKING:
    from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PROGRAMS = Programs("qedfuse", "passthrough", {"qemu": ["qsd"], "qemu-root": ["ld.so", "qsd"]})


# --- CPU time ---------------------------------------------------------------------------


def stat(name: str, user: int, system: int) -> str:
    """Return the content of a stat file; children have used 100 times as much."""
    fields = ["S", *"1234567890", str(user), str(system), str(100 * user), str(100 * system)]
    return f"4711 ({name}) {' '.join(fields)} 20 0 1 0\n"


@pytest.mark.parametrize("name", ["qedfuse", "a b", "x) R 1 2 (y"])
def test_cpu_time_is_without_children(name: str) -> None:
    """The fields are found whatever the process's name is, and those of children are ignored."""
    assert parse_stat(stat(name, 3 * TICKS, 5 * TICKS)) == CpuTime(3.0, 5.0)


def test_cpu_time_of_a_process() -> None:
    """The time of a process grows with its work."""
    before = cpu_time(os.getpid())
    end = time.monotonic() + 60
    while (used := cpu_time(os.getpid()).minus(before)).total < 0.05:
        assert time.monotonic() < end
    assert used.total == pytest.approx(used.user + used.system)


def test_cpu_time_of_no_process() -> None:
    """A server that has ended is reported."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(BenchmarkError, match="has ended by itself"):
        cpu_time(child.pid)


# --- fio --------------------------------------------------------------------------------


def job(read: int, write: int, error: int = 0) -> dict[str, object]:
    """Return fio's result of a load of 4 KiB requests that ran for two seconds."""
    sides = {
        name: {"iops": count / 2, "bw_bytes": count * 2048, "total_ios": count, "io_bytes": bytes_}
        for name, count, bytes_ in (("read", read, read * 4096), ("write", write, write * 4096))
    }
    return {"error": error, **sides}


def test_fio_results_are_summed() -> None:
    """The rates of concurrent loads are added; the writes are those of each disk."""
    output = f"fio: a warning\n{json.dumps({'jobs': [job(512, 0), job(256, 256)]})}"
    assert loads.parse_fio(output, "IOPS") == (512.0, 1024, 4 << 20, (0, 256))
    assert loads.parse_fio(output, "MiB/s").figure == 2.0


def test_fio_error_is_reported() -> None:
    """A load that failed gives no figure."""
    with pytest.raises(BenchmarkError, match="found error 5"):
        loads.parse_fio(json.dumps({"jobs": [job(1, 1), job(1, 1, error=5)]}), "IOPS")


# --- systems ----------------------------------------------------------------------------


def test_disks_of_one_mount(tmp_path: Path) -> None:
    """One server gets all images; QEMU has a mountpoint for each, the others one directory."""
    images = [tmp_path / "a.qed", tmp_path / "b.qed"]
    ours = service(PROGRAMS, "qedfuse", images, tmp_path, threads=True)
    assert ours.command == ["qedfuse", *map(str, images), str(tmp_path / "qedfuse.mnt"), "-f"]
    assert [disk.name for disk in ours.disks] == ["a.raw", "b.raw"]
    assert not ours.mounts_files
    flat = service(PROGRAMS, "baseline", images, tmp_path, threads=False)
    assert [disk.name for disk in flat.disks] == ["disk0.raw", "disk1.raw"]
    assert flat.variables == {"THREADS": "one"}
    peer = service(PROGRAMS, "qemu-root", images, tmp_path, threads=True)
    assert peer.command[:2] == ["ld.so", "qsd"]
    assert peer.mounts_files
    exports = [json.loads(text) for text in peer.command[5::4]]
    assert [export["mountpoint"] for export in exports] == list(map(str, peer.disks))
    assert len({export["node-name"] for export in exports}) == 2


def test_storage_daemon_of_a_root(tmp_path: Path) -> None:
    """The program of a root directory is started by that directory's loader, with its libraries."""
    libraries = tmp_path / "usr/lib/x86_64-linux-gnu"
    libraries.mkdir(parents=True)
    (libraries / "ld-linux-x86-64.so.2").touch()
    with pytest.raises(BenchmarkError, match="found no usr/bin/qemu-storage-daemon"):
        storage_daemon(tmp_path)
    (tmp_path / "usr/bin").mkdir()
    (tmp_path / "usr/bin/qemu-storage-daemon").touch()
    command = storage_daemon(tmp_path)
    assert command[0] == str(libraries / "ld-linux-x86-64.so.2")
    assert command[command.index("--library-path") + 1] == str(libraries)
    assert command[-1] == str(tmp_path / "usr/bin/qemu-storage-daemon")
    (libraries / "ld-linux-x86-64.so.2").unlink()
    with pytest.raises(BenchmarkError, match="expected a Debian root"):
        storage_daemon(tmp_path)


def test_titles_of_peers() -> None:
    """The title of a QEMU has its version, and two of the same version differ."""
    line = "qemu-storage-daemon version 10.0.2 (Debian 1:10.0.2+ds-2)"
    assert machine.qemu_title(line) == "QEMU 10.0.2"
    assert machine.qemu_title("unknown") == "QEMU"
    titles = machine.peer_titles({"qemu": ["echo", line], "qemu-root": ["echo", line]})
    assert titles == {"qemu": "QEMU 10.0.2", "qemu-root": "QEMU 10.0.2 no. 2"}


# --- page cache -------------------------------------------------------------------------


def test_continuous_write_back(tmp_path: Path) -> None:
    """Files can be written to while their write-back is started again and again."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    with ExitStack() as stack:
        stack.enter_context(pagecache.ContinuousWriteBack([path]))
        with path.open("r+b") as file:
            for _ in range(20):
                file.seek(0)
                file.write(b"x" * 65536)
                file.flush()
                time.sleep(0.001)
    assert path.read_bytes() == b"x" * 65536 + bytes((1 << 20) - 65536)
    with pytest.raises(OSError, match="sync_file_range"):
        pagecache.start_write_back(-1)
