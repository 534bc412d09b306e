"""The metrics, their documentation and the dashboard name the same metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from qedfuse.cli.qedfuse.intervals import intervals
from qedfuse.cli.qedfuse.quantities import byte_count, quantile
from qedfuse.mount.fuse.exporteddisk import ExportedDisks
from qedfuse.mount.fuse.requestcounters import BUCKETS, OPERATIONS
from qedfuse.mount.statistics.document import BUCKET_BOUNDS, StatisticsSource
from qedfuse.mount.statistics.prometheus import exposition
from qedfuse.mount.statistics.rates import hit_rates

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest

ROOT = Path(__file__).parents[2]


def document(**changed: int) -> dict[str, Any]:
    """Return a document with one disk, whose counters of requests are given by operation."""
    requests = {
        name: {
            "requests": changed.get(name, 0),
            "bytes": 4096 * changed.get(name, 0),
            "errors": 0,
            "fast": changed.get(name, 0) // 2,
            "seconds": changed.get(name, 0) / 1000,
            "histogram": [changed.get(name, 0), *[0] * (BUCKETS - 1)],
        }
        for name in OPERATIONS
    }
    server = {"requests": 5, "awaited_requests": changed.get("awaited", 0), "bytes": 100}
    disk = {
        "name": 'a"\\.raw', "image": "/a.qed", "size_bytes": 1 << 20, "writable": True,
        "failure": None, "need_check": False, "open_handles": 0, "requests": requests,
        "table_cache": {"loads": changed.get("loads", 0), "slices": 0, "bytes": 0,
                        "limit_bytes": 0, "dirty_bytes": 0, "evictions": 0},
        "space": {"file_bytes": 0, "bound_bytes": 1, "cluster_bytes": 65536,
                  "allocated_clusters": 1, "free_clusters": 2, "quarantined_clusters": 0},
        "scan": {"state": "complete", "tables": 1, "scanned_tables": 1},
        "writeback": {"cycles": 1, "datasyncs": 2, "table_writes": 3},
        "files": [
            {"depth": 0, "name": "/a.qed", "format": "qed", "reads": changed.get("read", 0),
             "bytes": 0, "share": None, "table_loads": changed.get("loads", 0),
             "uncached_reads": changed.get("uncached", 0), "server": None},
            {"depth": 1, "name": "https://x/b", "format": "raw", "reads": 10, "bytes": 0,
             "share": None, "table_loads": changed.get("remote_loads", 0), "uncached_reads": None,
             "server": server},
        ],
    }  # fmt: skip
    return {
        "version": 1, "qedfuse": "0", "mountpoint": "/mnt", "pid": 1, "time": 100.0,
        "uptime_seconds": float(changed.get("uptime", 10)), "resident_bytes": 1,
        "open_handles": 0, "queued_reads": 0, "bucket_bounds_seconds": list(BUCKET_BOUNDS),
        "sandbox": {"mode": "on", "in_force": [], "missing": []},
        "disks": [{**disk, "hit_rates": hit_rates(disk)}],
    }  # fmt: skip


async def test_a_suspended_machine_changes_the_uptime_and_not_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The uptime includes the time of a suspend, and a step of the clock moves no start."""
    seconds = {"since boot": 100.0, "unix": 1e9}
    clocks = SimpleNamespace(
        CLOCK_BOOTTIME=7,
        clock_gettime=lambda clock: {7: seconds["since boot"]}[clock],
        time=lambda: seconds["unix"],
        monotonic=lambda: 50.0,  # stands still
    )
    monkeypatch.setattr("qedfuse.mount.statistics.document.time", clocks)
    source = StatisticsSource(ExportedDisks([]), "/mnt")
    seconds.update({"since boot": 3700.0, "unix": 1e9 + 3600.25})
    found = await source.document()
    assert found["uptime_seconds"] == 3600.0
    assert found["start_time"] == 1e9
    line = 'qedfuse_start_time_seconds{mountpoint="/mnt"} 1000000000.0\n'
    assert line in exposition([found])
    before = dict(found)
    del before["start_time"]
    assert line.replace("0.0", "0.25") in exposition([before]), "a server of an earlier version"


def families(metrics: str) -> set[str]:
    """Return the names of the metric families."""
    return set(re.findall(r"^# TYPE (\S+) ", metrics, re.MULTILINE))


def test_the_docs_list_all_metrics() -> None:
    """The table in docs/stats.md has each metric, with its type."""
    metrics = exposition([document(read=3)])
    page = (ROOT / "docs" / "stats.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| `(qedfuse_\w+)` \| (\w+)", page, re.MULTILINE))
    assert dict(re.findall(r"^# TYPE (\S+) (\w+)$", metrics, re.MULTILINE)) == listed


def test_the_dashboard_shows_existing_metrics() -> None:
    """Each metric of the example dashboard exists."""
    dashboard = json.loads((ROOT / "examples" / "grafana-dashboard.json").read_text("utf-8"))
    used = set(re.findall(r"qedfuse_\w+", json.dumps(dashboard["panels"])))
    known = families(exposition([document()]))
    assert {re.sub(r"(_seconds)_(bucket|sum|count)$", r"\1", name) for name in used} <= known


def test_counters_end_in_total_and_labels_are_escaped() -> None:
    """Names follow the conventions, buckets are cumulative, and each family stands together."""
    metrics = exposition([document(read=3), document(write=4)])
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", metrics, re.MULTILINE):
        assert name.endswith("_total") == (kind == "counter"), name
    assert 'disk="a\\"\\\\.raw"' in metrics
    buckets = re.findall(r'duration_seconds_bucket\{.*"read",le="([^"]*)"\} (\d+)', metrics)
    assert len(buckets) == 2 * BUCKETS
    assert {count for _, count in buckets[:BUCKETS]} == {"3"}
    assert buckets[BUCKETS - 1][0] == "+Inf"
    assert len(families(metrics)) == metrics.count("# TYPE ")


def rates(disk: Mapping[str, Any]) -> list[float | None]:
    """Return the hit rates in their order."""
    return list(hit_rates(disk).values())


def test_hit_rates_are_shares_of_what_could_hit() -> None:
    """Each rate is the share of the requests or reads that could have hit; None of nothing."""
    assert rates(document()["disks"][0]) == [None, None, None, 1.0]
    found = document(read=8, write=2, loads=1, uncached=3, awaited=4)["disks"][0]
    assert rates(found) == [0.5, 0.9, 6 / 9, 0.6]
    assert rates(document(read=1, loads=5)["disks"][0])[1] == 0.0


def test_tables_of_remote_files_are_no_local_reads() -> None:
    """Only tables of local files count for the host's cache."""
    found = document(read=8, loads=1, remote_loads=50, uncached=3)["disks"][0]
    assert hit_rates(found)["host_cache"] == 6 / 9
    of_remote = {**found, "files": found["files"][1:]}
    assert hit_rates(of_remote)["host_cache"] is None


def test_an_interval_has_the_differences_of_counters() -> None:
    """Rates, times and hit rates are those of the interval, and sizes those of its end."""
    before = document(read=100, loads=10, uptime=10)
    after = document(read=300, write=4, loads=10, uptime=12)
    (found,) = intervals(before, after)
    assert (found.seconds, found.rate("read"), found.rate("write")) == (2.0, 100.0, 2.0)
    assert found.rate("read", "bytes") == 409600.0
    assert found.average("read") == 0.001
    assert found.average("flush") is None
    assert round(found.queue_length, 3) == 0.102
    assert found.disk["hit_rates"]["table_cache"] == 1.0
    assert found.disk["table_cache"]["limit_bytes"] == 0
    assert found.disk["files"][0]["reads"] == 200
    (first,) = intervals(None, after)
    assert (first.seconds, first.rate("read")) == (12.0, 25.0)
    (new,) = intervals({**before, "pid": 2}, after)
    assert new.seconds == 12.0, "another server"


def test_quantities_are_short() -> None:
    """Bytes have a unit, and a quantile is the upper bound of its bucket."""
    assert [byte_count(count) for count in (0, 1023, 1536, 3 << 40, 1 << 60)] == [
        *("0 B", "1023 B", "1.5 KiB", "3.0 TiB", "1024.0 PiB")
    ]
    assert quantile([0, 0], [1.0], 0.5) is None
    assert quantile([1, 98, 1], [1.0, 2.0], 0.99) == 2.0
    assert quantile([1, 98, 1], [1.0, 2.0], 1.0) == 2.0
    assert quantile([1, 98, 1], [1.0, 2.0], 0.005) == 1.0
