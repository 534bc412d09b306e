"""No command needs temporary files, except a snapshot, which reports that it has no place."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.support.sandbox import run_in_sandbox

PREPARE: Final = """
    PATH=$1/bin:$PATH
    unset TMPDIR TEMP TMP
    cd /srv/images
    mkdir /srv/m
"""
# What lies in the two directories stays readable: the tree under test may be below /tmp.
NO_PLACE: Final = {
    "read-only": """
        for place in /var/tmp /tmp; do
            mount --bind "$place" "$place"
            mount -o remount,bind,ro "$place"
        done
        mount -o remount,bind,ro /
        for place in / /tmp /var/tmp; do if touch "$place/here"; then exit 1; fi; done
    """,
    "full": """
        for place in /var/tmp /tmp; do
            layer=/run/layer$place
            mkdir -p "$layer"
            mount -t tmpfs -o size=4k sandbox "$layer"
            mkdir "$layer/upper" "$layer/work"
            mount -t overlay -o "lowerdir=$place,upperdir=$layer/upper,workdir=$layer/work" \\
                sandbox "$place"
            if head -c 1M /dev/zero >"$place/full"; then exit 1; fi
        done
    """,
}
SERVE: Final = """
    cd /proc
    image=/srv/images/a.qed
    qedimg create "$image" 4M
    qedfuse "$image" /srv/m -o "$2"
    test -e /srv/m/a.raw
    qedfuse umount /srv/m
    if test "$2" = rw; then
        qedimg check "$image"
        qedimg convert -O qcow2 "$image" /srv/images/a.qcow2
        qedimg compact "$image"
    fi
    echo "a snapshot:"
    code=0
    qedfuse "$image" /srv/m -o snapshot 2>&1 || code=$?
    echo "$code"
    if findmnt /srv/m; then exit 1; fi
"""


@pytest.mark.parametrize(
    ("kind", "option", "reason"),
    [("read-only", "rw", "Read-only file system"), ("full", "ro", "No space left on device")],
)
def test_no_command_needs_temporary_files(
    kind: str, option: str, reason: str, installation: Path
) -> None:
    """On a read-only or full system each command works, and a snapshot fails with the reason."""
    script = PREPARE + NO_PLACE[kind] + SERVE
    printed = run_in_sandbox(script, installation, Path(option))
    *lines, code = printed.partition("a snapshot:\n")[2].splitlines()
    assert code == "2", printed
    assert len(lines) == 1, printed
    assert lines[0].startswith("qedfuse: /var/tmp")
    assert lines[0].endswith(f": {reason}")
