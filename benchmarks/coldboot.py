"""What the cold boot of a virtual machine asks of the server of its image.

    python -m benchmarks.coldboot DISK KERNEL INITRD
    python -m benchmarks.coldboot DISK KERNEL INITRD --options prefetch=all

DISK is a raw file with ext4 and no partitions.  When the guest has booted, it must print ``BOOTED``
to its first serial port and power itself off.  A disk of Debian 12 for this:

    debootstrap --include=systemd-sysv,udev,dbus,openssh-server,cron,rsyslog bookworm root
    (in it: linux-image-amd64, initramfs-tools, and a service that prints and powers off)
    mke2fs -t ext4 -d root disk.raw 8G

nginx serves the image.  QEMU, without its own cache, boots twice from an overlay over the image:
first with an empty cache of qedfuse, then with the cache that the first boot has filled.  The
output has what the guest has read, what nginx has logged, and what `benchmarks.fleetload` computes
from the reads of the first boot.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.commands import BenchmarkError, run
from benchmarks.fleetload import MAX_AHEAD_BYTES, MIB, cost, file_reads, needed_requests
from tests.support.nginx import serving_nginx

if TYPE_CHECKING:
    from tests.support.nginx import Nginx

_BOOT_SECONDS: Final = 900
_READ: Final = re.compile(r"^qedfuse: read\w*\(\d+, (\d+), (\d+)\)", re.MULTILINE)
_UNITS_BYTES: Final = (1 << 16, 1 << 18, 1 << 20, 1 << 22)
_IMAGE: Final = "golden.qed"


def boot(arguments: argparse.Namespace, directory: Path, url: str, name: str) -> str:
    """Boot once; return the log of qedfuse.

    Raises:
        BenchmarkError: The guest did not boot, or qedfuse could not mount.
    """
    mountpoint, log, serial = (directory / f"{name}.{end}" for end in ("mnt", "log", "serial"))
    mountpoint.mkdir()
    words = ["-d", "-o", ",".join([f"overlay={directory}/{name}.qed", *arguments.options])]
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", "qedfuse", *words, url, mountpoint],
            stdout=output,
            stderr=output,
            env={**os.environ, "XDG_CACHE_HOME": str(directory / "cache")},
        ) as server,
    ):
        try:
            while not os.path.ismount(mountpoint):
                if server.poll() is not None:
                    msg = f"qedfuse: {log.read_text('utf-8').strip()}"
                    raise BenchmarkError(msg)
                time.sleep(0.1)
            run(
                *("qemu-system-x86_64", "-accel", arguments.accel, "-cpu", "max", "-m", "768"),
                *("-smp", "2", "-display", "none", "-no-reboot", "-device", "virtio-rng-pci"),
                *("-serial", f"file:{serial}"),
                *("-kernel", arguments.kernel, "-initrd", arguments.initrd),
                *("-append", "root=/dev/vda rw console=ttyS0 no_timer_check panic=-1"),
                "-drive",
                f"file={mountpoint}/golden.raw,format=raw,if=virtio,cache=none",
                seconds=_BOOT_SECONDS,
            )
        finally:
            if server.poll() is None:
                run(sys.executable, "-m", "qedfuse", "umount", str(mountpoint))
    if "BOOTED" not in serial.read_text("utf-8", "replace"):
        msg = "the guest: found no line BOOTED, expected one at the end of the boot"
        raise BenchmarkError(msg)
    return log.read_text("utf-8", "replace")


def measure(arguments: argparse.Namespace, directory: Path, nginx: Nginx) -> None:
    """Boot twice, and print what each boot has asked."""
    image = nginx.directory / _IMAGE
    run("qemu-img", "convert", "-O", "qed", arguments.disk, str(image), seconds=900)
    os.utime(image, (1_000_000_000, 1_000_000_000))  # as an image that was published long ago
    print(f"image: {image.stat().st_size / MIB:.0f} MiB")
    logged = 0
    logs = {}
    for name in ("cold", "again"):
        begin = time.monotonic()
        logs[name] = boot(arguments, directory, f"{nginx.http}/{_IMAGE}", name)
        answers = [size for _status, size in nginx.requests(f"/{_IMAGE}")][logged:]
        logged += len(answers)
        data = [size for size in answers if size > 1]
        print(
            f"{name}: {time.monotonic() - begin:.0f} s, {len(data)} requests with "
            f"{sum(data) / MIB:.1f} MiB, {len(answers) - len(data)} for the version"
        )
    reads = [(int(match[1]), int(match[2])) for match in _READ.finditer(logs["cold"])]
    print(f"reads: {len(reads)} with {sum(length for _, length in reads) / MIB:.1f} MiB\n")
    content = image.read_bytes()
    found = list(file_reads(content, reads))
    print("| unit KiB | ahead MiB | requests | MiB |\n| --- | --- | --- | --- |")
    for unit in _UNITS_BYTES:
        for ahead in (0, MAX_AHEAD_BYTES):
            requests = needed_requests(found, len(content), unit, ahead)
            computed = cost(requests, len(content), unit)
            line = f"| {unit >> 10} | {ahead >> 20} | {computed.requests} "
            print(f"{line}| {computed.bytes / MIB:.0f} |")


def main() -> int:
    """Measure; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    for name in ("disk", "kernel", "initrd"):
        parser.add_argument(name)
    parser.add_argument("--options", action="append", default=[], help="options of the mount")
    parser.add_argument("--accel", default="tcg,thread=multi", help="QEMU's accelerator")
    parser.add_argument("--directory", help="where the image and the caches are made")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="coldboot-", dir=arguments.directory) as name,
        serving_nginx(Path(name) / "web") as nginx,
    ):
        measure(arguments, Path(name), nginx)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"coldboot: {error}", file=sys.stderr)
        sys.exit(1)
