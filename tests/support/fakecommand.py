"""A subcommand ``fake`` of qedimg whose body a test defines, in this or in another process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, Final

from qedfuse.cli.qedimg import main as program

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    import pytest

ROOT: Final = Path(__file__).parents[2]

_PROLOGUE: Final = """
import argparse, os, signal, sys, time
from types import ModuleType
from qedfuse.cli.qedimg import main as program
from qedfuse.cli.qedimg.arguments import add_progress
from qedfuse.cli.qedimg.progress import progress
from qedfuse.cli.qedimg.running import run_async
fake = ModuleType("fake")
fake.EXAMPLE, fake.DESCRIPTION = "qedimg fake", "Does what a test says."
fake.add_arguments = add_progress
program.COMMANDS["fake"] = "does what a test says"
sys.modules["qedfuse.cli.qedimg.fake"] = fake
"""


def install(
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[argparse.Namespace], int],
    add_arguments: Callable[[argparse.ArgumentParser], Any] = lambda _parser: None,
    **more: object,
) -> None:
    """Install ``fake`` as a subcommand in this process; ``more`` are attributes of its module."""
    module = ModuleType("qedfuse.cli.qedimg.fake")
    vars(module).update(
        {"EXAMPLE": "qedimg fake", "DESCRIPTION": "Does what a test says.", **more},
        run=run,
        add_arguments=add_arguments,
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert isinstance(program.COMMANDS, dict)
    monkeypatch.setitem(program.COMMANDS, "fake", "does what a test says")


def words(run: str, *arguments: str) -> list[str]:
    """Return the command line of a process in which ``fake`` runs the body of a function.

    The body can use ``arguments``, and `progress` and `run_async` of qedimg.
    """
    body = textwrap.indent(textwrap.dedent(run), "    ")
    script = f"{_PROLOGUE}\ndef run(arguments):\n{body}\nfake.run = run\nsys.exit(program.main())\n"
    return [sys.executable, "-c", script, "fake", *arguments]


def start(
    command: Sequence[str | bytes],
    environment: dict[str, str] | None = None,
    *,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
    stdout: IO[bytes] | int = subprocess.PIPE,
    stderr: IO[bytes] | int = subprocess.PIPE,
    directory: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process that can import the project."""
    return subprocess.Popen(
        command,
        # The output is buffered, as in the command of users.
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""} | (environment or {}),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=directory,
    )


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """Wait for a process; return its exit code, its output and its errors."""
    output, complaint = process.communicate(timeout=60)
    return process.returncode, (output or b"").decode(), (complaint or b"").decode()


def qedimg(*arguments: str | bytes, **more: Any) -> tuple[int, str, str]:  # noqa: ANN401
    """Run the program qedimg; return its exit code, its output and its errors."""
    command: list[Any] = [sys.executable, "-m", "qedfuse.cli.qedimg", *arguments]
    return finish(start(command, **more))
