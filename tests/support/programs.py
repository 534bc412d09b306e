"""The two programs, each run in a process of its own: forked if possible, else a new interpreter.

`tests.support.forkserver` says what a forked process does not show.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from tests.support import forkserver

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Process: TypeAlias = subprocess.Popen[str] | forkserver.ForkedProcess

StrPath: TypeAlias = str | os.PathLike[str]

TREE: Final = Path(__file__).parents[2]

LOADED: Final = {
    # The sandbox of a mount depends on which modules are loaded: each mount loads these.
    "qedfuse": (
        "qedfuse.cli.qedfuse.main",
        "qedfuse.mount.options",
        "qedfuse.mount.process.logs",
        "qedfuse.mount.session",
        "qedfuse.mount.commands.umount",
        "qedfuse.mount.process.daemon",
    ),
    "qedimg": (
        "qedfuse.cli.qedimg.main",
        *(
            f"qedfuse.cli.qedimg.{name}"
            for name in (
                *("log", "check", "commit", "compact", "compare", "convert"),
                *("create", "info", "map", "rebase"),
            )
        ),
        "qedfuse.disk.opening",
        "qedfuse.foreign.opening",
        "qedfuse.foreign.confined",
        "qedfuse.foreign.foreignfile",
        "qedfuse.foreign.process",
        "qedfuse.hostio.tablewalk",
        "qedfuse.nbd.opening",
        "qedfuse.remote.credentials",
        "qedfuse.tools.copying.convert",
        "qedfuse.tools.editing.commit",
        "qedfuse.tools.editing.compact",
        "qedfuse.tools.editing.create",
        "qedfuse.tools.editing.rebase",
        "qedfuse.tools.inspection.chaininfo",
        "qedfuse.tools.inspection.mapping",
        "qedfuse.tools.repair.imagecheck",
        "qedfuse.tools.source.qedsource",
        "shutil",
    ),
}
"""The modules that the fork server of each program has loaded."""


def code_of(program: str) -> str:
    """Return Python code that runs a program."""
    return (
        f"import sys\nfrom qedfuse.cli.entrypoints import {program}_program as program\n"
        "sys.exit(program())\n"
    )


def environment() -> dict[str, str]:
    """Return an environment in which the programs are those of this tree."""
    return {**os.environ, "PYTHONPATH": str(TREE), "PYTHONWARNINGS": "error"}


def start(
    program: str,
    words: Sequence[StrPath],
    *,
    prelude: str = "",
    patch: str = "",
    stdout: int = subprocess.PIPE,
    pass_fds: Sequence[int] = (),
    cwd: StrPath | None = None,
    variables: Mapping[str, str] | None = None,
) -> Process:
    """Start a program with a pipe from its standard error, and by default from its output.

    ``prelude`` is Python code that runs first; then the process is a new interpreter, because the
    code may replace functions that other modules import by name when they are loaded.  ``patch``
    is such code that replaces only what is looked up at each use: methods, and attributes of
    modules.  ``variables`` are more variables of the environment; those of the interpreter need a
    new one.
    """
    arguments = [os.fspath(word) for word in words]
    forks = not (prelude or any(name.startswith("PYTHON") for name in variables or ()))
    variables = environment() | dict(variables or {})
    code = f"{patch}\n{code_of(program)}"
    if forks and not forkserver.NEW_INTERPRETERS:
        return forkserver.start(
            code,
            arguments,
            LOADED[program],
            environment=variables,
            cwd=cwd,
            stdout=stdout,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
        )
    return subprocess.Popen(
        [sys.executable, "-c", f"{prelude}\n{code}", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        errors="backslashreplace",
        env=variables,
        cwd=cwd,
        pass_fds=pass_fds,
        bufsize=1,
    )


def run(
    program: str,
    *words: StrPath,
    timeout: float,
    prelude: str = "",
    patch: str = "",
    cwd: StrPath | None = None,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; see `start`.

    Raises:
        subprocess.TimeoutExpired: It has not ended after ``timeout`` seconds, and was killed.
    """
    process = start(program, words, prelude=prelude, patch=patch, cwd=cwd, variables=variables)
    try:
        out, complaint = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode or 0, out, complaint)


def qedimg(*words: StrPath, cwd: StrPath | None = None) -> tuple[int, str, str]:
    """Run qedimg to its end; return its exit code, its output and its errors."""
    done = run("qedimg", *words, timeout=60, cwd=cwd)
    return done.returncode, done.stdout, done.stderr
