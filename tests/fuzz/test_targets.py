"""The fuzzer for parsers: a fixed share of inputs passes, and broken code is found."""

from __future__ import annotations

import random
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import pytest

from qedfuse.foreign.runmap import UNKNOWN, RunMap
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.partitions.partition import Partition
from tests.fuzz import __main__ as fuzzer
from tests.fuzz import corpus, inputs
from tests.fuzz.guided import run_guided
from tests.fuzz.mutation import Mutator
from tests.fuzz.reduction import MAX_INPUT_BYTES, MAX_INPUTS, reduced
from tests.fuzz.targets.drawn import Drawn
from tests.fuzz.targets.patches import decode, encode
from tests.fuzz.targets.registry import NAMES, target_named
from tests.fuzz.targets.target import Target
from tests.support.disks import build_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from urllib3.response import BaseHTTPResponse

    from qedfuse.partitions.mbr import Entry

_SEED: Final = 1
_INPUTS: Final = 400
"""How many inputs are drawn for a target that `_FEWER_INPUTS` does not name."""
_FEWER_INPUTS: Final = {"image": 60, "backingname": 150, "commandline": 150, "httpresponse": 200}
"""How many inputs are drawn for a target that takes milliseconds for each."""
_QEMU_QUESTIONS: Final = 8
_WITH_PEER: Final = [name for name in NAMES if target_named(name).ask_peer is not None]


def _kept(name: str) -> int:
    """Return how many inputs of a target are passed before drawn ones."""
    return len(target_named(name).seeds()) + len(corpus.load(name))


@pytest.mark.parametrize("name", [name for name in NAMES if target_named(name).uses_c])
def test_inputs_for_c_code_find_nothing(name: str) -> None:
    """A target that reaches C code passes; tests/sanitize.sh runs this test with sanitizers."""
    count = _FEWER_INPUTS.get(name, _INPUTS)
    assert inputs.run_inputs(name, count, _SEED) == _kept(name) + count


@pytest.mark.parametrize("name", [name for name in NAMES if not target_named(name).uses_c])
def test_kept_and_drawn_inputs_find_nothing(name: str) -> None:
    """A target passes its seeds, the inputs that are kept, and a fixed share of drawn ones."""
    count = _FEWER_INPUTS.get(name, _INPUTS)
    assert inputs.run_inputs(name, count, _SEED) == _kept(name) + count


@pytest.mark.parametrize("name", _WITH_PEER)
def test_qemu_agrees_on_a_sample(name: str) -> None:
    """QEMU makes the same of a few inputs as qedfuse."""
    assert inputs.ask_peers(name, _QEMU_QUESTIONS, _SEED) == _QEMU_QUESTIONS


def test_the_corpus_is_small() -> None:
    """Each file of the corpus belongs to a target, and has few and short inputs."""
    names = {path.stem for path in Path(corpus.__file__).with_name("corpus").iterdir()}
    assert names <= set(NAMES)
    for name in names:
        kept = corpus.load(name)
        assert 0 < len(kept) <= MAX_INPUTS
        assert len(set(kept)) == len(kept)
        assert max(map(len, kept)) <= MAX_INPUT_BYTES


def _uncut(number: int, entry: Entry, start: int, _sectors: int, _problems: list[str]) -> Partition:
    """Return the partition of an entry, even if it ends after the end of the disk."""
    return Partition(number, start * 512, entry.length * 512, "83")


async def _repair_nothing(_repair: object) -> None:
    """Change nothing."""


def _open_any(path: str, *_policy: object) -> PosixFile:
    """Open a backing file wherever it lies."""
    return PosixFile.open(path)


def _unchecked_body(response: BaseHTTPResponse, *_: object) -> Iterator[bytearray]:
    """Yield the body of a response, whatever its length is."""
    yield bytearray(response.read())


def _fail(*_arguments: object) -> NoReturn:
    """Raise an exception that is no `QedError`."""
    msg = "broken on purpose"
    raise ValueError(msg)


def _add_unchecked(
    run_map: RunMap, found: dict[str, Any], files: Sequence[tuple[int, int] | None]
) -> bool:
    """Add a range to a map without a look at the length of the file."""
    file = files[found["depth"]]
    number = UNKNOWN if file is None or found.get("offset") is None else file[0]
    return run_map.add(found["length"], number, found.get("offset") or 0)


_SABOTAGES: Final[Sequence[tuple[str, str, object]]] = [
    ("header", "qedfuse.ondisk.header._check_offsets", lambda *_: None),
    ("image", "qedfuse.check.entryclassifier.EntryClassifier.l2_errors", lambda *_: []),
    ("image", "qedfuse.check.tablerepair.TableRepair.run", _repair_nothing),
    ("partitions", "qedfuse.partitions.mbr._partition", _uncut),
    ("vmdk", "qedfuse.foreign.vmdk._COMMENT", re.compile(rb"(?s).*")),
    ("qemumap", "qedfuse.foreign.mapping._add", _add_unchecked),
    ("nbdreplies", "qedfuse.nbd.replies._check_chunk", lambda *_, **__: None),
    ("nbdhandshake", "qedfuse.nbd.handshake._MAX_REPLY_BYTES", 1 << 40),
    ("url", "qedfuse.remote.urlsyntax.hide_secrets", str),
    ("backingname", "qedfuse.disk.lookup.backing.open_local_base", _open_any),
    ("optionlist", "qedfuse.mount.optionsyntax.escape_value", str),
    ("mountrecord", "qedfuse.mount.system.mountrecord.asdict", lambda record: {"pid": record.pid}),
    ("cacheunits", "qedfuse.remote.unitfile._checksum", lambda *_: 0),
    ("httpresponse", "qedfuse.remote.webclient.read_parts", _unchecked_body),
    ("commandline", "qedfuse.cli.qedimg.parser.Parser.error", _fail),
]
"""The name of a target, the function that is broken for it, and the function that replaces it."""


@pytest.mark.parametrize(("name", "broken", "replacement"), _SABOTAGES)
def test_broken_code_is_found(
    name: str, broken: str, replacement: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a check of the code is removed, an input of the target becomes a finding."""
    monkeypatch.setattr(broken, replacement)
    monkeypatch.setattr(inputs, "_MAX_SHRINK_TRIES", 0)
    with pytest.raises(AssertionError, match=f"--target {name} --input "):
        inputs.run_inputs(name, 2000, _SEED)


def _install(monkeypatch: pytest.MonkeyPatch, check: Callable[[bytes], None]) -> Target:
    """Let a function be the only target."""
    target = Target(check, lambda: [b"a good input", b"another bad input"])
    monkeypatch.setattr(inputs, "target_named", lambda _name: target)
    return target


def test_a_finding_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the smallest input that raises the same exception at the same place."""

    def refuse(data: bytes) -> None:
        if len(data) < 3:
            raise ValueError
        assert b"bad" not in data, "it is bad"

    _install(monkeypatch, refuse)
    with pytest.raises(AssertionError, match="ValueError") as found:
        inputs.check_one("made-up", b"xy")
    with pytest.raises(AssertionError) as found:
        inputs.check_one("made-up", b"this is a bad input")
    assert str(found.value).splitlines() == [
        "made-up: AssertionError: it is bad",
        "assert b'bad' not in b'bad'",
        f"  python -m tests.fuzz --target made-up --input {b'bad'.hex()}",
    ]


def test_memory_and_time_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """An input that allocates too much, or never ends, is a finding."""
    monkeypatch.setattr(inputs, "_MAX_CPU_SECONDS", 0.2)
    held: list[bytes] = []

    def use(data: bytes) -> None:
        if data == b"memory":
            held.append(bytes(2 * inputs._MAX_MEMORY_BYTES))
        while data == b"time":
            pass

    _install(monkeypatch, use)
    inputs.check_one("made-up", b"nothing")
    with pytest.raises(AssertionError, match="MemoryError"):
        inputs.check_one("made-up", b"memory")
    with pytest.raises(AssertionError, match="TooSlowError: found an input that takes more"):
        inputs.check_one("made-up", b"time")
    assert held == []
    assert bytes(2 * inputs._MAX_MEMORY_BYTES), "a limit is left"


def test_drawn_inputs_depend_on_the_seed_only() -> None:
    """The same seed draws the same inputs, within the limit, and most of them are new."""

    def draw(seed: int) -> list[bytes]:
        mutator = Mutator(random.Random(seed), [b"one", b"two words"], [b"token"], 20)
        return [mutator.draw() for _ in range(200)]

    drawn = draw(1)
    assert drawn == draw(1) != draw(2)
    assert max(map(len, drawn)) == 20
    assert any(b"token" in data for data in drawn)
    assert len(set(drawn)) > 150


def test_a_file_survives_its_encoding() -> None:
    """The input for a file of words describes the same file."""
    content = build_image(1 << 20, {0: b"a" * 4096, 1: 1, 200: b"z"})
    assert decode(Drawn(encode(content))) == content
    assert decode(Drawn(b"")) == b""
    assert len(decode(Drawn(b"\xff" * 1000))) <= 320 * 512


def test_only_inputs_that_reach_new_lines_are_kept() -> None:
    """Of two inputs that reach the same lines, the shorter one is kept; earlier ones stay."""
    target = target_named("optionlist")
    new = [b"\0unknown=1", b"\0unknown=12", b"\0unknown=123"]
    assert reduced(target, [b"\0ro"], new) == [b"\0ro", b"\0unknown=1"]
    assert reduced(target, new, [b"\0unknown="]) == new


def test_the_command_runs_a_target(capsys: pytest.CaptureFixture[str]) -> None:
    """``--target`` runs a target without atheris, and ``--input`` passes one input to it."""
    for words, text in (
        (
            ["--engine=plain", "--inputs=50", "--seed=7"],
            f"{50 + _kept('url')} inputs from seed 7: ",
        ),
        (["--input", "0041"], ""),
    ):
        assert fuzzer.main(["--target", "url", *words]) == 0
        assert capsys.readouterr().out == f"url: {text}nothing found\n"


def test_a_failure_of_atheris_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the process of atheris ends with an error and without a finding, the run fails."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(AssertionError, match="url: atheris ended with exit code 1, expected 0"):
        run_guided("url", 1, 1, 1)


def test_the_command_reports_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finding ends the run with exit code 1."""
    monkeypatch.setattr("qedfuse.remote.address.parse_host", _fail)
    words = ["--target", "url", "--engine", "plain", "--seconds", "60"]
    assert fuzzer.main(words) == 1
    assert capsys.readouterr().out.startswith("url: ValueError: broken on purpose")
