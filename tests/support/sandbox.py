"""Scripts that change the system, run where only they see the change.

A script gets mounts and processes of its own: empty ``/srv``, ``/mnt``, ``/opt`` and
``/run``, and copies of ``/etc``, ``/sbin`` and parts of ``/usr/local`` that vanish with it.
Loop devices are the machine's; those that it leaves attached are detached.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
TIMEOUT: Final = 60.0
"""Seconds after which a script that does not end is taken to hang."""

_SEPARATE: Final = """
set -eu
if mount --make-rprivate / 2>/dev/null; then
    exec bash -c "$@"
fi
# The root of a chroot is no mount, so it is made one.
mount --rbind / /mnt
mount --make-rprivate /mnt
exec chroot /mnt bash -c "$@"
"""
"""Keeps the mounts that follow from being seen by anybody else."""

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
for place in /srv /mnt /opt /run; do
    mount -t tmpfs sandbox "$place"
done
mkdir -p /run/copies
for place in /etc /usr/sbin /usr/local/bin /usr/local/share; do
    copy=/run/copies/$(basename "$place")
    mkdir "$copy" "$copy.work"
    mount -t overlay -o "lowerdir=$place,upperdir=$copy,workdir=$copy.work" sandbox "$place"
done
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
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
    """Make what an installation looks like to examples/install.sh: programs and pages.

    It runs this tree; a real environment takes pip and half a minute.
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
    """Run a bash script that must succeed, with arguments; give what it printed."""
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
    return done.stdout
