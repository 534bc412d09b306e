"""The table of the benchmark of images on servers, and how it starts other programs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.remote import Figures
from benchmarks.remotesystems import Source, how_to_start

STORE = Source(
    "s3://golden",
    Path("/images/golden.qed"),
    {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "one",
        "AWS_SECRET_ACCESS_KEY": "two",
    },
)
WEB = Source("http://127.0.0.1:2", Path("/images/golden.qed"), {})


def test_a_row_compares_medians() -> None:
    """The ratio is to the fastest other program, and not to the same program with a local file."""
    figures = Figures()
    figures.rates = {
        ("read", "qedfuse"): [30.0, 10.0, 20.0],
        ("read", "local"): [40.0],
        ("read", "nbdkit"): [5.0],
        ("read", "rclone"): [8.0, 12.0],
    }
    figures.micros = {("read", "qedfuse"): [12.0], ("read", "local"): [10.0]}
    assert figures.row("read", "IOPS", ["qedfuse", "local", "nbdkit", "rclone"]) == (
        "| read | IOPS | 20 (10 to 30) | 40 (40 to 40) | 5 (5 to 5) | 10 (8 to 12) "
        "| 2 | 0.5 | 12 µs (1.2) |"
    )
    assert figures.row("none", "s", ["qedfuse"]) == "| none | s |  |  |  |  |"


def test_each_program_reads_the_same_server(tmp_path: Path) -> None:
    """Web servers are named by URLs, stores by the variables of each program."""
    for system in ("qedfuse", "nbdkit"):
        started = how_to_start(system, WEB, tmp_path, "qedfuse")
        assert any(WEB.url in word for word in started.command)
        assert started.disk.is_relative_to(started.mountpoint)
    local = how_to_start("local", WEB, tmp_path, "qedfuse")
    assert str(WEB.image) in local.command
    rclone = how_to_start("rclone", STORE, tmp_path, "qedfuse")
    assert ":s3:golden" in rclone.command
    assert rclone.variables["RCLONE_S3_ENDPOINT"] == "http://127.0.0.1:1"
    assert how_to_start("rclone", WEB, tmp_path, "qedfuse").variables["RCLONE_HTTP_URL"] == WEB.url
