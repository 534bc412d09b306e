"""A server in a sandbox can serve its mount and can do nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from qedfuse.mount.sandbox.privileges import CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
from qedfuse.util.landlock import landlock_version
from tests.support import qemu
from tests.support.extensions import needs_extensions
from tests.support.mounted import COMMAND, TIMEOUT, front, is_mounted, qedfuse, refused
from tests.support.programs import TREE, environment
from tests.support.users import USER_ID, as_user, user_directory

pytestmark = [
    needs_extensions,
    pytest.mark.skipif(landlock_version() < 4, reason="needs Landlock with TCP (Linux 6.7)"),
]

SERVER: Final = """
import ctypes, json, os, pathlib, resource, socket, subprocess, sys, threading
from qedfuse.mount.optionparser import parse_options
from qedfuse.mount.process.logs import log_to_stderr
os.environ["OPENBLAS_NUM_THREADS"] = "1"
from qedfuse.mount.sandbox.sandbox import Sandbox
from qedfuse.mount.session import MountRequest, run_session

entered, is_tried = threading.Event(), threading.Event()
earlier = []

def try_in_thread():
    entered.wait()
    try:
        open(beside).close()
    except OSError as error:
        earlier.append(error.errno)
    is_tried.set()
    threading.Event().wait()

def enter(sandbox, directories, original=Sandbox.enter):
    threading.Thread(target=try_in_thread, daemon=True).start()
    original(sandbox, directories)

Sandbox.enter = enter

image, mountpoint, options, pidfile, *only = sys.argv[1:]
host_socket = os.path.join(os.path.dirname(image), "socket")
listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listener.bind(host_socket)
outside = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
beside = os.path.join(os.path.dirname(image), "beside")
libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

def ring():
    if libc.syscall(425, 4, ctypes.create_string_buffer(120)) < 0:
        raise OSError(ctypes.get_errno(), "io_uring_setup")

def send_signal():
    os.kill(os.getppid(), 0)

def connect_by_family():
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).connect(("127.0.0.1", 9))

def connect_on_host():
    socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect(host_socket)

def connect_connected():
    outside.connect(host_socket)

ATTEMPTS = {
    "make a socket for the host": connect_on_host,
    "connect a socket of the host": connect_connected,
    "send to a socket of the host": lambda: outside.sendto(b"", host_socket),
    "read limits of a process": lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CORE),
    "send a signal to a thread": lambda: call("syscall", 234, os.getppid(), os.getppid(), 0),
    "read /etc/shadow": lambda: open("/etc/shadow").close(),
    "read a file beside the image": lambda: open(beside).close(),
    "write a file beside the image": lambda: open(beside, "w").close(),
    "make a file beside the image": lambda: open(beside + "2", "x").close(),
    "open the image again": lambda: open(image, "r+b").close(),
    "read the memory of a process": lambda: open(f"/proc/{os.getppid()}/mem", "rb").close(),
    "read the environment of a process": lambda: open(f"/proc/{os.getppid()}/environ").read(),
    "list another directory": lambda: os.listdir("/root"),
    "remove the image": lambda: os.unlink(image),
    "connect to a TCP port": connect_by_family,
    "execute a program": lambda: os.execv("/bin/true", ["true"]),
    "run a program in a child process": lambda: subprocess.run(["/bin/true"], check=False),
    "fork": os.fork,
    "trace a process": lambda: call("ptrace", 16, os.getppid(), 0, 0),
    "mount a file system": lambda: call("mount", b"none", b"/mnt", b"tmpfs", 0, 0),
    "unmount the mount": lambda: call("umount2", os.fsencode(mountpoint), 2),
    "enter a new user namespace": lambda: call("unshare", 0x10000000),
    "load a kernel module": lambda: call("syscall", 175, None, 0, b""),
    "load a BPF program": lambda: call("syscall", 321, 0, None, 0),
    "change the user": lambda: os.setuid(1),
    "change the owner of a file": lambda: os.chown(beside, 1, 1),
    "change the permissions of a file": lambda: os.chmod(beside, 0o777),
    "send a signal": send_signal,
    "make a queue for reads": ring,
    "make a device": lambda: os.mknod(beside + "3", 0o20600, 0x103),
}

def ready():
    result = {}
    for name in only or ATTEMPTS:
        attempt = ATTEMPTS[name]
        try:
            attempt()
        except OSError as error:
            result[name] = error.errno
        else:
            result[name] = 0
    status = {}
    for task in pathlib.Path("/proc/self/task").iterdir():
        words = task.joinpath("status").read_text().split()
        status[task.name] = {
            key: words[words.index(key + ":") + 1] for key in ("NoNewPrivs", "Seccomp", "CapEff")
        }
    if sys.argv[3] == "sandbox=strict":
        entered.set()
        is_tried.wait()
    print(json.dumps({"earlier": earlier, "attempts": result, "threads": status,
        "core": resource.getrlimit(4)}), flush=True)

log_to_stderr()
request = MountRequest((image,), mountpoint, parse_options([options]).absolute(), pidfile or None)
sys.exit(run_session(request, ready))
"""
"""Runs a mount in the foreground.  When the disk can be used, the server tries what must fail."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a new image in a directory with one other file."""
    directory = tmp_path / "images"
    directory.mkdir()
    (directory / "beside").write_text("secret")
    return qemu.create(directory / "vm.qed", 64 << 20)


def run_server(
    image: Path, mnt: Path, options: str, *only: str, pidfile: str | Path = ""
) -> dict[str, Any]:
    """Run `SERVER`, end it by SIGTERM, and return its report; ``only`` names some attempts."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(image), str(mnt), options, str(pidfile), *only],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    with process:
        assert process.stdout is not None
        report: dict[str, Any] = json.loads(process.stdout.readline())
        assert is_mounted(mnt)
        process.terminate()
        assert process.wait(30) == 0
    assert not is_mounted(mnt)
    return report


def documented_attempts() -> dict[str, str]:
    """Return the table of attempts and their errors in docs/security.md."""
    lines = (TREE / "docs" / "security.md").read_text().splitlines()
    begin = lines.index("| what was tried | what happened |") + 2
    rows = [line.strip("| ").split(" | ") for line in lines[begin : lines.index("", begin)]]
    return {attempt.replace("`", ""): error for attempt, error in rows}


def test_everything_else_is_refused(image: Path, mnt: Path, tmp_path: Path) -> None:
    """A server in a sandbox fails in each attempt, in all threads, and then unmounts."""
    pidfile = tmp_path / "run" / "pid"
    pidfile.parent.mkdir()
    report = run_server(image, mnt, "sandbox=strict", pidfile=pidfile)
    found = {
        name: errno.errorcode.get(code, "succeeds") for name, code in report["attempts"].items()
    }
    assert found == documented_attempts()
    threads = report["threads"].values()
    assert len(threads) > 1
    assert report["earlier"] == [errno.EACCES], "a thread that had started before the sandbox"
    kept = 1 << 1 | 1 << 2 | 1 << 3
    for thread in threads:
        assert (thread["NoNewPrivs"], thread["Seccomp"]) == ("1", "2")
        assert int(thread["CapEff"], 16) & ~kept == 0
    assert report["core"] == [0, 0]
    assert not pidfile.exists(), "the server may remove its pid file"
    assert image.parent.joinpath("beside").read_text() == "secret"


def test_without_a_sandbox_attempts_succeed(image: Path, mnt: Path) -> None:
    """The attempts of the test before fail because of the sandbox, and for no other reason."""
    harmless = (
        *("read a file beside the image", "make a file beside the image", "open the image again"),
        *("run a program in a child process", "make a queue for reads", "send a signal"),
        *("change the permissions of a file", "change the owner of a file"),
        *("connect a socket of the host", "send to a socket of the host"),
        *("read limits of a process", "send a signal to a thread"),
    )
    report = run_server(image, mnt, "sandbox=off", *harmless)
    assert report["attempts"] == dict.fromkeys(harmless, 0)
    assert all(thread["NoNewPrivs"] == "0" for thread in report["threads"].values())


def test_log_and_statistics_say_what_is_in_force(image: Path, mnt: Path) -> None:
    """A mount is in a sandbox by default; a line of the log and the statistics list its parts."""
    with front(image, mnt) as mount:
        (document,) = json.loads(qedfuse("stats", "--output=json", mnt).stdout)["mounts"]
        text = qedfuse("stats", mnt).stdout
        metrics = qedfuse("stats", "--output=prometheus", mnt).stdout
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0
    (line,) = mount.sandbox
    assert line.startswith(f"qedfuse: {mnt}: sandbox on: Landlock ")
    assert "seccomp (" in line
    found = document["sandbox"]
    assert (found["mode"], found["missing"]) == ("on", [])
    listed = f"sandbox on: {', '.join(found['in_force'])}"
    assert line.endswith(listed)
    assert f"  {listed}\n" in text
    assert f'qedfuse_sandbox_complete{{mountpoint="{mnt}"}} 1\n' in metrics


def kept_capabilities(pid: int) -> int:
    """Return the effective capabilities of a process, one bit each."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nCapEff:\t")[2].split()[0], 16)


@pytest.mark.parametrize("owner", [0, USER_ID])
@pytest.mark.parametrize("with_metrics", [False, True], ids=["pid file", "socket"])
def test_files_in_a_directory_of_another_user_are_removed(
    image: Path, mnt: Path, tmp_path: Path, *, with_metrics: bool, owner: int
) -> None:
    """Root's read-only server keeps CAP_DAC_OVERRIDE only if it removes a file there."""
    directory = tmp_path / "run"
    directory.mkdir(mode=0o755)
    os.chown(directory, owner, owner)
    pidfile, own = directory / "file", tmp_path / "pid"
    options = "sandbox=strict"
    if with_metrics:
        pidfile, options = own, f"{options},metrics=unix:{directory / 'file'}"
    done = qedfuse("-r", "-o", options, "--pidfile", pidfile, image, mnt)
    try:
        assert done.returncode == 0, done.stderr
        assert [path.name for path in directory.iterdir()] == ["file"]
        pid = int(pidfile.read_text())
        expected = 1 << CAP_DAC_READ_SEARCH | (owner != 0) << CAP_DAC_OVERRIDE
        assert kept_capabilities(pid) == expected
    finally:
        done = qedfuse("umount", mnt)
    assert done.returncode == 0, done.stderr
    assert list(directory.iterdir()) == []


def test_an_ordinary_user(image: Path) -> None:
    """The server of a user unmounts by fusermount3, which it could not run itself."""
    with user_directory() as directory:
        own = directory / "vm.qed"
        shutil.copy(image, own)
        os.chown(own, USER_ID, USER_ID)
        done = as_user(*COMMAND, "-o", "sandbox=strict", own, directory / "mnt")
        assert done.returncode == 0, done.stderr
        assert is_mounted(directory / "mnt")
        done = as_user(*COMMAND, "umount", directory / "mnt")
        assert done.returncode == 0, done.stderr
        assert not is_mounted(directory / "mnt")


def test_strict_needs_every_part(image: Path, mnt: Path) -> None:
    """With ``strict`` a missing library refuses the mount; with ``on`` the log names it."""
    prelude = "import qedfuse.mount.sandbox.seccomp as s; s._LIBRARY = 'libmissing.so'"
    done = qedfuse(image, mnt, "-o", "sandbox=strict", prelude=prelude)
    assert done.returncode == 2
    assert done.stderr == (
        "qedfuse: option sandbox=strict: seccomp: found no library libmissing.so (with sandbox=on "
        "the mount starts without it)\n"
    )
    with front("-o", "sandbox=on", image, mnt, prelude=prelude) as mount:
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0
    assert mount.sandbox[0].endswith("; without seccomp (found no library libmissing.so)")


def test_an_older_kernel_gives_less(image: Path, mnt: Path) -> None:
    """Without Landlock the rest of the sandbox is in force, and ``strict`` refuses the mount."""
    prelude = "import qedfuse.mount.sandbox.sandbox as s; s.landlock_version = lambda: 0"
    done = qedfuse(image, mnt, "-o", "sandbox=strict", prelude=prelude)
    assert done.returncode == 2
    assert done.stderr == (
        "qedfuse: option sandbox=strict: Landlock: the kernel or a filter of system calls refuses "
        "it (with sandbox=on the mount starts without it)\n"
    )
    with front(image, mnt, prelude=prelude) as mount:
        mount.wait_for_sandbox()
        status = Path(f"/proc/{mount.process.pid}/status").read_text()
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0
    assert "\nNoNewPrivs:\t1\n" in status
    assert mount.sandbox[0].startswith(f"qedfuse: {mnt}: sandbox on: no new privileges, ")
    assert mount.sandbox[0].endswith(
        "; without Landlock (the kernel or a filter of system calls refuses it)"
    )


def test_a_memory_limit(image: Path, mnt: Path) -> None:
    """The address space is limited; a limit that is too low is refused."""
    message = refused("-o", "memory_limit=64M", image, mnt, code=1)
    assert message.startswith("option memory_limit: found 64 MiB, expected at least ")
    with front("-o", "memory_limit=4G", image, mnt) as mount:
        limits = Path(f"/proc/{mount.process.pid}/limits").read_text().splitlines()
        (line,) = (line for line in limits if line.startswith("Max address space"))
        assert line.split()[3:5] == [str(4 << 30)] * 2
        mount.signal(signal.SIGTERM)
        assert mount.finish()[0] == 0


def test_a_restart_of_the_log_daemon(image: Path, mnt: Path, tmp_path: Path) -> None:
    """A server that may connect to no socket of the host still finds the new socket of a daemon."""
    place, pidfile = tmp_path / "log", tmp_path / "run" / "pid"
    pidfile.parent.mkdir()
    prelude = f"""
from qedfuse.mount.process import logs
logs.system_log.__defaults__ = ({str(place)!r},)
"""

    def listen() -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(str(place))
        listener.settimeout(TIMEOUT)
        return listener

    with listen() as listener:
        done = qedfuse("-o", "sandbox=strict", "--pidfile", pidfile, image, mnt, prelude=prelude)
        try:
            assert (done.returncode, done.stderr) == (0, "")
            while b"sandbox strict: Landlock" not in listener.recv(1 << 16):
                pass
            pid = int(pidfile.read_text())
            place.unlink()
            with listen() as successor:
                listener.close()
                os.kill(pid, signal.SIGUSR1)
                while b"disks 1" not in successor.recv(1 << 16):
                    pass
        finally:
            assert qedfuse("umount", mnt).returncode == 0
