"""A sandbox for scripts that change the system.

A script runs in its own mount and process namespace, with empty ``/srv``, ``/mnt``, ``/opt``
and ``/run``, and with copies of ``/etc``, ``/sbin`` and parts of ``/usr/local`` that vanish with
it.  Loop devices belong to the machine; those that a script leaves attached are detached.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.support.directorylock import locked
from tests.support.mounted import without_notice

ROOT: Final = Path(__file__).parents[2]
PROGRAMS: Final = (Path("/usr/local/bin"), Path("/usr/sbin"))
"""Where scripts install programs; a test that changes these directories themselves locks them."""
LOOP_FILES: Final = Path("/mnt")
"""Only one sandbox at a time holds the lock of this directory of the host.  When a sandbox ends, it
detaches all loop devices whose files seem to lie there, and each sandbox has such files."""
TIMEOUT: Final = 200.0
"""Seconds after which a script counts as hung."""

_SEPARATE: Final = """
set -eu
if mount --make-rprivate / 2>/dev/null; then
    exec bash -c "$@"
fi
# The root of a chroot is not a mount point, so the tree is bind-mounted first.
mount --rbind / /mnt
mount --make-rprivate /mnt
exec chroot /mnt bash -c "$@"
"""
"""Makes the mounts that follow invisible outside the namespace."""

_PROLOGUE: Final = """
set -eu
leave() {
    code=$?
    for used in $(losetup --noheadings --list --output NAME,BACK-FILE |
            sed -nE 's,^([^ ]+) +/(srv|mnt)/.*,\\1,p'); do
        losetup --detach "$used"
    done
    exit "$code"
}
trap leave EXIT
for directory in /srv /mnt /opt /run; do
    mount -t tmpfs sandbox "$directory"
done
mkdir -p /run/copies
for directory in /etc /usr/sbin /usr/local/bin /usr/local/share; do
    copy=/run/copies/$(basename "$directory")
    mkdir "$copy" "$copy.work"
    mount -t overlay -o "lowerdir=$directory,upperdir=$copy,workdir=$copy.work" \\
        sandbox "$directory"
done
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# The helpers of an installed package, which examples/install.sh does not replace.
rm -f /usr/sbin/mount.qedfuse /usr/sbin/mount.fuse.qedfuse
mkdir /srv/images
"""

_ENTRY: Final = """\
#!{python}
import sys
sys.path.insert(0, {root!r})
from qedfuse.cli.{module} import main
sys.exit(main())
"""


def make_environment(directory: Path) -> Path:
    """Make a directory with programs and man pages, as examples/install.sh expects, and return it.

    Its programs run this tree; installing a real environment with pip takes half a minute.
    """
    (directory / "bin").mkdir(parents=True)
    for name, module in (("qedfuse", "qedfuse.main"), ("qedimg", "qedimg.main")):
        program = directory / "bin" / name
        entry = _ENTRY.format(python=sys.executable, root=str(ROOT), module=module)
        program.write_text(entry, encoding="utf-8")
        program.chmod(0o755)
    shutil.copytree(ROOT / "docs" / "share", directory / "share")
    return directory


def run_in_sandbox(script: str, *arguments: Path) -> str:
    """Run a bash script that must succeed, with arguments; return its output."""
    with ExitStack() as stack:
        stack.enter_context(locked(LOOP_FILES, shared=False))
        for directory in PROGRAMS:
            stack.enter_context(locked(directory, shared=True))
        done = subprocess.run(
            ["unshare", "--mount", "--propagation=unchanged", "--pid", "--fork", "--kill-child",
             "--mount-proc", "bash", "-c", _SEPARATE, "sandbox", _PROLOGUE + script, "sandbox",
             *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            timeout=TIMEOUT,
            check=False,
        )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stdout}"
    return without_notice(done.stdout)
