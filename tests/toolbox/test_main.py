"""The program around the subcommands: arguments in, one line and an exit code out."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from qedfuse import errors
from qedfuse.cli.qedimg import main as program
from qedfuse.cli.qedimg.output import BROKEN_PIPE
from qedfuse.cli.qedimg.parser import Parser
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.text import printable
from tests.support.fakecommand import finish, install, qedimg, start, words

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

SCREEN_LINES, SCREEN_COLUMNS = 24, 80


def failing(error: BaseException) -> Callable[[argparse.Namespace], int]:
    """Return a command that raises an error."""

    def run(_arguments: argparse.Namespace) -> NoReturn:
        raise error

    return run


def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """The help lists every command and fits on a screen."""
    assert program.main(["--help"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) < SCREEN_LINES
    assert max(map(len, lines)) < SCREEN_COLUMNS
    assert [name for name in program.COMMANDS if f"\n  {name} " not in text] == []


def test_no_command_prints_the_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """Without arguments the usage is printed and the exit code is 1, so that scripts stop."""
    assert program.main([]) == 1
    assert "usage: qedimg COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("form", [["fake", "--help"], ["help", "fake"], ["fake", "-h"]])
def test_help_of_a_command(
    form: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each form of help prints the example and the exit codes, in lines that fit."""
    install(monkeypatch, lambda _arguments: 5)
    assert program.main(form) == 0
    text = capsys.readouterr().out
    assert "Example:\n  qedimg fake\n" in text
    assert "16 in use" in " ".join(text.split())
    assert max(map(len, text.splitlines())) < SCREEN_COLUMNS


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("chek", "unknown command (did you mean check?)"),
        ("maps", "unknown command (did you mean map?)"),
        ("snapshot", "unknown command (see: qedimg --help)"),
        ("-q", "found an option, expected a command first (see: qedimg --help)"),
        ("a\nb\udcff", "unknown command (see: qedimg --help)"),
    ],
)
def test_unknown_command(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown command gets one line with the most similar command, if there is one."""
    assert program.main([name, "x"]) == 1
    assert capsys.readouterr().err == f"qedimg: {printable(name)}: {hint}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x"), 1),
        (errors.HostError("x"), 1),
        (errors.NoSpaceError("x"), 1),
        (errors.ReadOnlyError("x"), 1),
        (errors.QedError("x"), 1),
        (errors.NotQedError("x"), 12),
        (errors.HeaderError("x", "f", 1, "2"), 12),
        (errors.CorruptImageError("x"), 13),
        (errors.UnsupportedError("x"), 14),
        (errors.NeedsCheckError("x"), 15),
        (errors.ImageInUseError("x"), 16),
        (errors.BackingRefusedError("x"), 17),
        (ExceptionGroup("g", [ValueError(), ExceptionGroup("h", [errors.ImageError("x")])]), 12),
        (OSError(5, "Input/output error", "x"), 1),
        (OSError(5, "Input/output error", "x\nTraceback"), 1),
        (OSError(5, "Input/output error", 3), 1),
        (MemoryError(), 1),
        (ValueError("x\nTraceback"), 70),
        (KeyboardInterrupt(), 130),
        (BaseExceptionGroup("g", [KeyboardInterrupt()]), 130),
        # The cancellation of a task does not derive from Exception either.
        (BaseExceptionGroup("g", [GeneratorExit(), MemoryError()]), 1),
    ],
    ids=repr,
)
def test_every_failure_is_one_line_and_a_code(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every exception, expected or not, becomes one line and an exit code, never a traceback."""
    install(monkeypatch, failing(error))
    assert program.main(["fake"]) == code
    complaint = capsys.readouterr().err
    assert complaint.startswith("qedimg: ")
    assert complaint.count("\n") == 1


def test_a_command_with_its_own_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error becomes FAILED unless the command's own exit codes include its code."""
    codes = {0: "the same", 1: "different", 2: "failed", 16: "in use"}
    install(monkeypatch, failing(errors.ImageError("x")), EXIT_CODES=codes, FAILED=2)
    assert program.main(["fake"]) == 2
    assert program.main(["fake", "--nonsense"]) == 2
    install(monkeypatch, failing(errors.ImageInUseError("x")), EXIT_CODES=codes, FAILED=2)
    assert program.main(["fake"]) == 16
    install(monkeypatch, failing(errors.ImageInUseError("x")), EXIT_CODES={0: "sound"})
    assert program.main(["fake"]) == 1


def test_a_command_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module that cannot be imported is reported in one line."""
    assert isinstance(program.COMMANDS, dict)
    monkeypatch.setitem(program.COMMANDS, "nosuch", "is not there")
    assert program.main(["nosuch"]) == 70
    assert capsys.readouterr().err.startswith("qedimg: internal error: ModuleNotFoundError: ")


def test_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With QEDIMG_TRACEBACK an unexpected exception is raised."""
    install(monkeypatch, failing(ValueError("x")))
    monkeypatch.setenv("QEDIMG_TRACEBACK", "1")
    with pytest.raises(ValueError, match="x"):
        program.main(["fake"])


def test_quiet_and_verbose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command has -q and -v, but not both together."""
    seen = []

    def run(arguments: argparse.Namespace) -> int:
        seen.append((arguments.quiet, arguments.verbose))
        return 0

    install(monkeypatch, run)
    assert [program.main(["fake", *more]) for more in ([], ["-q"], ["-v"], ["-q", "-v"])] == [
        *(0, 0, 0, 1)
    ]
    assert seen == [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize(("option", "seen"), [("-q", "EF"), ("", "EFW"), ("-v", "EFWI")])
def test_log_goes_to_stderr(option: str, seen: str) -> None:
    """Warnings are printed to stderr; -q keeps only errors, -v adds information."""
    run = """
    import logging
    for level in ("INFO", "WARNING", "ERROR"):
        logging.getLogger("qedfuse").log(getattr(logging, level), level[0])
    sys.stderr.write("F")
    return 0
    """
    _code, output, complaint = finish(start(words(run, *filter(None, [option]))))
    assert output == ""
    assert {char for char in complaint.replace("qedimg: ", "") if char.isalpha()} == set(seen)


def shape(parser: argparse.ArgumentParser) -> None:
    """Give a parser each kind of argument."""
    parser.add_argument("image")
    parser.add_argument("more", nargs="*")
    parser.add_argument("-b", "--base")
    parser.add_argument("--shrink", action="store_true")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.qed -1G", ("a.qed", ["-1G"], None, False)),
        ("a.qed -1G --shrink", ("a.qed", ["-1G"], None, True)),
        ("--shrink a.qed +1G", ("a.qed", ["+1G"], None, True)),
        ("a.qed --shrink 1G", ("a.qed", ["1G"], None, True)),
        ("-- -a.qed", ("-a.qed", [], None, False)),
        ("--shrink -- -a.qed -1G", ("-a.qed", ["-1G"], None, True)),
        ("-b x -- --shrink -b y", ("--shrink", ["-b", "y"], "x", False)),
        ("a.qed -- -- -", ("a.qed", ["--", "-"], None, False)),
        ("a.qed -b -1", ("a.qed", [], "-1", False)),
        ("a.qed --base=-x", ("a.qed", [], "-x", False)),
        ("- a", ("-", ["a"], None, False)),
    ],
)
def test_arguments_are_parsed_as_meant(
    line: str, expected: tuple[str, list[str], str | None, bool]
) -> None:
    """Options may stand anywhere, sizes may be negative, and names may begin with a dash."""
    parser = Parser(prog="qedimg fake", allow_abbrev=False)
    shape(parser)
    found = parser.parse(line.split(" "))
    assert (found.image, found.more, found.base, found.shrink) == expected


@pytest.mark.parametrize("line", ["a --nonsense", "a --bas x", "--shrink", "a --shrink=1", "-a"])
def test_unknown_options_are_refused(line: str) -> None:
    """Unknown options are refused, abbreviations included."""
    parser = Parser(prog="qedimg fake", allow_abbrev=False)
    shape(parser)
    with pytest.raises(errors.UsageError, match=r"\(see: qedimg fake --help\)$"):
        parser.parse(line.split(" "))


def test_a_bad_negative_number_is_named_as_it_was_typed() -> None:
    """The message quotes a bad negative number as it was typed."""
    parser = Parser(prog="qedimg fake", allow_abbrev=False)
    parser.add_argument("size", type=int)
    with pytest.raises(errors.UsageError, match="invalid int value: '-1x' "):
        parser.parse(["-1x"])


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A name in another encoding is printed escaped, whatever the locale."""
    name = os.fsencode(tmp_path) + b"/\xff\xe9\n"
    for locale in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C.UTF-8"}):
        code, output, complaint = qedimg(b"create", name, b"nonsense", environment=locale)
        assert (code, output) == (1, "")
        assert complaint.count("\n") == 1
        run = "sys.stdout.write(os.fsdecode(b'\\xff') + chr(0x20ac) + '\\n'); return 0"
        code, output, complaint = finish(start(words(run), environment=locale))
        assert (code, complaint) == (0, "")
        assert output.rstrip("\n").endswith(("\u20ac", "\\u20ac"))


def test_a_full_disk_behind_stdout() -> None:
    """Lost output is an error, at a write or at the end."""
    for command in (words("print('x'); return 0"), words("print('x' * 99999); return 0")):
        with Path("/dev/full").open("wb") as full:
            code, _output, complaint = finish(start(command, stdout=full))
        assert (code, complaint) == (1, "qedimg: standard output: No space left on device\n")


def test_a_full_disk_does_not_hide_the_result() -> None:
    """The exit code of a command that has failed is kept when its last output is lost."""
    with Path("/dev/full").open("wb") as full:
        assert finish(start(words("print('damaged'); return 2"), stdout=full))[0] == 2


def test_exit_code_without_stderr() -> None:
    """The exit code is right when the message cannot be printed."""
    with Path("/dev/full").open("wb") as full:
        assert qedimg("nosuch", stderr=full)[0] == 1


@pytest.mark.parametrize("text", ["'x'", "'x' * 999999"], ids=["at the end", "on the way"])
def test_a_reader_that_closes_the_pipe(text: str) -> None:
    """A closed pipe ends the program silently with the usual exit code."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start(words(f"print({text}); return 0"), stdout=writing)
    os.close(writing)
    assert finish(process) == (BROKEN_PIPE, "", "")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_stream_that_is_closed(number: int, tmp_path: Path) -> None:
    """A file that is opened never gets the number of a closed standard stream."""
    path = tmp_path / "image"
    run = f"""
    with open({str(path)!r}, "wb", buffering=0) as file:
        assert file.fileno() > 2
        os.write(file.fileno(), b"data")
        sys.stdout.write("said")
        sys.stdout.flush()
    return 0
    """
    line = f'exec {number}>&-; exec "$@"'
    code, _output, complaint = finish(start(["bash", "-c", line, "bash", *words(run)]))
    assert path.read_bytes() == b"data"
    assert code == (1 if number == 1 else 0)
    assert complaint == ("qedimg: standard output: Bad file descriptor\n" if number == 1 else "")


def test_help_loads_nothing_heavy() -> None:
    """Help and usage errors load neither numpy nor trio."""
    script = """
import sys
from qedfuse.cli.qedimg.main import main
main(["--help"]); main(["chek"]); main(["-V"])
print(sorted({"numpy", "trio", "rich", "construct", "json", "logging"} & set(sys.modules)))
"""
    code, output, _complaint = finish(start([sys.executable, "-c", script]))
    assert code == 0
    assert output.splitlines()[-1] == "[]"


@pytest.mark.expect_log("a.qed: datasync: Input/output error")
def test_a_logged_failure_is_not_printed_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that was logged is not printed again: the log has the consequence too."""
    path = tmp_path / "a.qed"
    assert program.main(["create", "-q", str(path), "1M"]) == 0

    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def fail_in_thread(_file: PosixFile) -> None:
        fail(-1)

    monkeypatch.setattr(os, "fdatasync", fail)
    # On a slow or busy host a native thread makes the call, not `os.fdatasync`.
    monkeypatch.setattr(PosixFile, "_datasync_in_thread", fail_in_thread)
    shown = io.StringIO()
    handler = logging.StreamHandler(shown)
    logging.getLogger().addHandler(handler)
    try:
        assert program.main(["resize", str(path), "2M"]) == 1
    finally:
        logging.getLogger().removeHandler(handler)
    said = shown.getvalue() + capfd.readouterr().err
    assert said.count("datasync: Input/output error") == 1
    assert "the disk is read-only from now on" in said


@pytest.mark.parametrize(
    "words",
    [
        ["URL"],
        ["info", "vm.qed", "URL"],
        ["check", "--repair=URL", "vm.qed"],
        ["check", "--URL", "vm.qed"],
        ["create", "vm.qed", "URL"],
        ["resize", "vm.qed", "URL"],
        ["convert", "-f", "URL", "vm.qed", "vm.raw"],
    ],
)
def test_no_message_repeats_a_secret(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A message about an argument leaves out the query of a URL in it, which may be a signature."""
    url = "https://me:hush@host/golden.qed?sig=hush"
    assert program.main([word.replace("URL", url) for word in words]) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "https://...@host/golden.qed?..." in text
    assert "hush" not in text


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EMFILE, "see: ulimit -n"), (errno.ENFILE, "fs.file-max")]
)
def test_a_lack_of_descriptors_is_no_failure_of_the_output(
    number: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If no descriptor is free for a pipe, one line says so, and does not blame the output."""
    install(monkeypatch, failing(OSError(number, os.strerror(number))))
    assert program.main(["fake"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("qedimg: open files: found ")
    assert expected in said
    assert said.count("\n") == 1
