"""The command line of ``qedfuse``: which arguments it accepts, in which order, and its refusals."""

from __future__ import annotations

import getopt
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import qedfuse
from qedfuse.cli.qedfuse import main as program
from qedfuse.cli.qedfuse.arguments import (
    Arguments,
    StatsArguments,
    UmountArguments,
    _permuting_getopt,
    parse_arguments,
    parse_mount_helper_arguments,
    parse_stats_arguments,
    parse_umount_arguments,
)
from qedfuse.cli.qedfuse.main import main
from qedfuse.cli.qedfuse.usage import USAGE
from qedfuse.errors import UsageError
from qedfuse.mount.optionparser import KERNEL_FLAGS, known_options

if TYPE_CHECKING:
    from pathlib import Path


def test_options_may_stand_anywhere() -> None:
    """Options are accepted before, between and after the paths."""
    assert parse_arguments(
        ["-o", "ro", "a", "-f", "b", "mnt", "--pidfile", "p", "-ouid=1"]
    ) == Arguments(["a", "b", "mnt"], ["ro", "uid=1"], foreground=True, pidfile="p")
    assert parse_arguments(["--", "-a", "-b"]).paths == ["-a", "-b"]


@pytest.mark.parametrize("words", [[], ["-f"]])
def test_a_module_that_cannot_be_loaded_is_reported(words: list[str], tmp_path: Path) -> None:
    """A failure to load the modules of a mount is one line, also from the background process."""
    script = (
        "import sys\n"
        "sys.modules['qedfuse.mount.session'] = None\n"
        "from qedfuse.cli.entrypoints import qedfuse_program\n"
        "sys.exit(qedfuse_program())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words, "vm.qed", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 70
    assert done.stderr.startswith("qedfuse: internal error: ModuleNotFoundError: import of qedfuse")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", ["SIGUSR1", "SIGUSR2"])
def test_a_signal_for_statistics_does_not_end_the_start(number: str) -> None:
    """The signals that a mount answers with statistics have no effect before it serves."""
    script = (
        "import os, signal, sys\n"
        "class Kill:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'qedfuse.cli.qedfuse.main':\n"
        f"            os.kill(os.getpid(), signal.{number})\n"
        "            print('sent', flush=True)\n"
        "sys.meta_path.insert(0, Kill())\n"
        "from qedfuse.cli.entrypoints import qedfuse_program\n"
        "sys.exit(qedfuse_program())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"sent\nqedfuse {qedfuse.__version__}\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_short_options() -> None:
    """-r means ro, -d implies -f, and -s is libfuse's."""
    assert parse_arguments(["-rds", "a", "b"]) == Arguments(
        ["a", "b"], ["ro"], foreground=True, debug=True
    )


def test_the_helper_of_mount_has_its_own_meanings() -> None:
    """As mount.qedfuse, -f means fake, -s means sloppy, and what mount(8) passes is accepted."""
    assert parse_mount_helper_arguments(
        ["a", "mnt", "-sfnvrw", "-t", "fuse.qedfuse", "-o", "x"]
    ) == Arguments(["a", "mnt"], ["ro", "rw", "x"], fake=True, sloppy=True)


def test_another_mount_namespace_is_refused() -> None:
    """A mount in the namespace of mount(8), and not in the demanded one, must not be a success."""
    with pytest.raises(UsageError, match=r"^option -N: .* is not supported \(nsenter "):
        parse_mount_helper_arguments(["a", "mnt", "-o", "rw", "-N", "/proc/7/fd/4"])


@pytest.mark.parametrize("is_posix", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        "a -o ro b",
        "a b -t fuse.qedfuse -o rw,uid=1",
        "a - -o -- b -- -f -o",
        "--opt=x a --pid p b --pidfile=q -d",
        "-ro x a -fox b -o -f",
        "-- -o",
        "a --",
        "",
        "a -z b",
        "a --frob b",
        "a --foreground=x b",
        "a b -o",
        "a b --pidfile",
        "a --f b --p",
        "--",
    ],
)
def test_options_are_found_as_by_getopt(
    words: str, monkeypatch: pytest.MonkeyPatch, *, is_posix: bool
) -> None:
    """The words are sorted as by GNU's getopt, also with POSIXLY_CORRECT in the environment."""
    short, long = "o:fdsrVht:", ["foreground", "debug", "pidfile=", "options=", "fetch"]
    monkeypatch.delenv("POSIXLY_CORRECT", raising=False)
    expected: object
    try:
        expected = getopt.gnu_getopt(words.split(), short, long)
    except getopt.GetoptError as error:
        expected = str(error)
    if is_posix:
        monkeypatch.setenv("POSIXLY_CORRECT", "1")
    found: object
    try:
        found = _permuting_getopt(words.split(), short, long)
    except getopt.GetoptError as error:
        found = str(error)
    assert found == expected


def test_posixly_correct_changes_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options after operands, as mount(8) passes them, are options for each of the commands."""
    monkeypatch.setenv("POSIXLY_CORRECT", "1")
    assert parse_arguments(["a", "m", "-o", "ro"]) == Arguments(["a", "m"], ["ro"])
    assert parse_mount_helper_arguments(["a", "m", "-o", "ro"]) == Arguments(["a", "m"], ["ro"])
    assert parse_umount_arguments(["m", "--timeout", "5"]) == UmountArguments("m", 5.0)
    assert parse_stats_arguments(["m", "--watch"]) == StatsArguments(mountpoint="m", watch=True)


@pytest.mark.parametrize("words", [["-z"], ["--frob"], ["-o"], ["--pidfile"], ["-n", "a", "b"]])
def test_unknown_words_are_refused(words: list[str]) -> None:
    """An unknown option and an option without its value are usage errors."""
    with pytest.raises(UsageError, match="see: qedfuse --help"):
        parse_arguments(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected SOURCE... and MOUNTPOINT (see: qedfuse --help)"),
        (["a"], "expected SOURCE... and MOUNTPOINT (see: qedfuse --help)"),
        (["a", "b", "-o", "frob"], "option frob: unknown"),
        (
            ["a", "b", "--pidfile", ""],
            "option --pidfile: found '', expected a path (see: qedfuse --help)",
        ),
        (["umount"], "umount: found 0 mountpoints, expected one (see: qedfuse --help)"),
        (["umount", "a", "b"], "umount: found 2 mountpoints, expected one (see: qedfuse --help)"),
        (
            ["umount", "a", "--timeout", "x"],
            "option --timeout: found x, expected 0 to 1000000 seconds",
        ),
        (
            ["umount", "a", "--timeout", "nan"],
            "option --timeout: found nan, expected 0 to 1000000 seconds",
        ),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_1(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A usage error is one line on stderr that says what is expected, and exit code 1."""
    assert main(words) == 1
    assert capsys.readouterr() == ("", f"qedfuse: {message}\n")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    """--help and --version print to stdout and succeed."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qedfuse {qedfuse.__version__}\n"
    assert main(["-h"]) == 0
    assert main(["umount", "-h"]) == 0
    assert "usage: qedfuse SOURCE... MOUNTPOINT" in capsys.readouterr().out


def test_help_names_every_option() -> None:
    """--help lists every option of the parser."""
    for name in known_options().keys() - KERNEL_FLAGS:
        assert name in USAGE


@pytest.mark.parametrize(
    "statement",
    [
        "from qedfuse.cli.qedfuse.main import main; main(['--version'])",
        "import qedfuse.mount.commands.umount",
        "import qedfuse.mount.optionparser, qedfuse.mount.images.naming",
        "import qedfuse.mount.process.logs, qedfuse.mount.process.daemon",
    ],
    ids=["help", "umount", "options", "daemon"],
)
def test_no_heavy_module_before_it_is_needed(statement: str) -> None:
    """--help, umount and the process that a daemon leaves behind need no event loop and no numpy.

    After a fork, each module that was loaded before costs the child a copy of its memory.
    """
    code = (
        f"import sys; {statement};"
        "print(sorted({'trio', 'pyfuse3', 'numpy', 'construct'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_closed_pipe_is_no_error() -> None:
    """Output into a closed pipe ends the command without a traceback."""
    command = f"set -o pipefail; {sys.executable} -m qedfuse --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_bug_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unexpected exception is reported in one line without a traceback, with exit code 70."""

    def broken(_arguments: object) -> int:
        msg = "no\nsuch luck"
        raise RuntimeError(msg)

    monkeypatch.setitem(program._ACTIONS, "mount", broken)
    assert main(["a", "b"]) == 70
    assert capsys.readouterr().err == (
        "qedfuse: internal error: RuntimeError: no\\nsuch luck (-d shows where)\n"
    )
    monkeypatch.setitem(program._COMMANDS, "umount", broken)
    assert main(["umount", "a"]) == 70
    assert capsys.readouterr().err == "qedfuse: internal error: RuntimeError: no\\nsuch luck\n"
    with pytest.raises(RuntimeError):
        main(["a", "b", "-d"])


def test_an_interrupt_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C before the mount ends the command silently with exit code 130."""

    def interrupted(_arguments: Arguments) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(program._ACTIONS, "mount", interrupted)
    assert main(["a", "b"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "words",
    [
        ["--URL", "a", "b"],
        ["-o", "URL", "a", "b"],
        ["-o", "remote_timeout=URL", "a", "b"],
        ["umount", "a", "--timeout", "URL"],
    ],
)
def test_no_message_repeats_a_secret(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A message about an argument leaves out the query of a URL in it, which may be a signature."""
    url = "https://host/golden.qed?sig=hush"
    assert main([word.replace("URL", url) for word in words]) == 1
    text = capsys.readouterr().err
    assert "https://host/golden.qed?..." in text
    assert "hush" not in text
