"""Random chains that mix formats: each command gives what qemu-img gives on the same chain.

    python -m tests.foreign.rounds --rounds 300 --seed 7

Each round draws two chains, and runs on them ``info``, ``map``, ``convert``, ``compare``,
``rebase`` and ``commit``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from tests.support import qemu
from tests.support.chains import assert_like_qemus
from tests.support.foreignchains import FORMATS, draw_mixed, processes
from tests.support.programs import qedimg

_ALLOWED: Final = ("--foreign", "qemu")
_UNIT_BYTES: Final = 512


class Round:
    """Two chains, and the commands that run on them.

    Attributes:
        happened: How often each kind of case has happened.
    """

    def __init__(self, directory: Path, seed: int) -> None:
        """Draw the chains from ``seed`` in an empty directory."""
        self.happened = Counter[str]()
        self._random = random.Random(seed)
        self._scratch = directory
        self._directory = directory / "chains"
        self._directory.mkdir()
        depth = self._random.randrange(2, 6)
        self._top = draw_mixed(self._directory, self._random, "a", depth, "qed")
        self._formats = [item["format"] for item in _chain_info(self._top)]
        other_top = self._random.choice(("qed", "qcow2", "qcow", "vmdk", "vdi"))
        other_depth = self._random.randrange(1, 5) if other_top in {"qed", "qcow2", "qcow"} else 1
        self._other = draw_mixed(self._directory, self._random, "b", other_depth, other_top)
        self._content = _content(self._top)
        self.happened["formats: " + "-".join(self._formats)] += 1

    def run(self) -> None:
        """Run all commands; a difference from QEMU raises AssertionError."""
        for path in (self._top, self._other):
            self._info(path)
            self._map(path)
            self._convert(path)
        self._convert_over()
        self._compare()
        self._rebase()
        self._rebase_unsafe()
        self._rebase_to_none()
        self._commit()
        assert processes(self._scratch) == []

    def _info(self, path: Path) -> None:
        found = json.loads(_qedimg("info", "--backing-chain", *_ALLOWED, "--output=json", path))
        keys = ("filename", "format", "virtual-size", "backing-filename", "full-backing-filename")
        expected = _chain_info(path)
        for ours, theirs in zip(found, expected, strict=True):
            assert {key: ours.get(key) for key in keys} == {key: theirs.get(key) for key in keys}

    def _map(self, path: Path) -> None:
        """Compare maps of the whole disk, and of a part."""
        formats = [item["format"] for item in _chain_info(path)]
        foreign = next((at for at, name in enumerate(formats) if name in FORMATS), len(formats))
        size = qemu.info(path)["virtual-size"]
        start = self._random.randrange(size)
        length = self._random.randrange(1, size)
        for words in ((), (f"--start-offset={start}", f"--max-length={length}")):
            found = json.loads(_qedimg("map", *_ALLOWED, "--output=json", *words, path))
            command = ("qemu-img", "map", "-f", _kind(path), "--output=json")
            expected = json.loads(qemu.run(*command, *words, path).stdout)
            ours, theirs = _merged(found, foreign), _merged(expected, foreign)
            assert ours == theirs, (path.name, sorted(set(ours) ^ set(theirs)))
        self.happened["map"] += 1

    def _convert(self, path: Path) -> None:
        expected = _content(path)
        for target in ("raw", "qed"):
            copy = self._scratch / f"copy.{target}"
            _qedimg("convert", *_ALLOWED, "-O", target, path, copy)
            assert _content(copy) == expected
            if target == "qed":
                measured = json.loads(_qedimg("measure", *_ALLOWED, "--output=json", path))
                assert measured["required"] == copy.stat().st_size
            copy.unlink()
        self.happened["convert"] += 1

    def _convert_over(self) -> None:
        """Copy the disk over the other chain, as a file that has only the difference."""
        copy = self._directory / "copy.qed"
        words = ("-B", self._other.name, "-F", _kind(self._other))
        _qedimg("convert", *_ALLOWED, "--compare", *words, self._top, copy)
        assert _content(copy) == self._content == _own_content(copy, self._scratch)
        assert qemu.check(copy).code == 0
        self._map(copy)
        copy.unlink()

    def _compare(self) -> None:
        """Compare the disk with the other disk, with itself, and with a copy that differs."""
        copy = self._scratch / "copy.raw"
        copy.write_bytes(self._content)
        self._compare_with(self._other)
        self._compare_with(copy)
        at = self._random.randrange(len(self._content))
        with copy.open("r+b") as file:
            file.seek(at)
            file.write(bytes([self._content[at] ^ 1]))
        self._compare_with(copy)
        with copy.open("ab") as file:
            file.truncate(len(self._content) + 4096)
        self._compare_with(copy)
        copy.unlink()

    def _compare_with(self, second: Path) -> None:
        pair = (self._top, second) if self._random.random() < 0.5 else (second, self._top)
        formats = ("-f", _kind(pair[0]), "-F", _kind(pair[1]))
        done = qemu.run("qemu-img", "compare", *formats, *pair, codes=(0, 1))
        code, output, complaint = qedimg("compare", *_ALLOWED, *pair)
        assert (code, complaint) == (done.returncode, ""), output
        self.happened[f"compare: {code}"] += 1
        if code:
            # QEMU reports the beginning of the sector that differs.
            assert _offset(output) // _UNIT_BYTES == _offset(done.stdout) // _UNIT_BYTES

    def _rebase(self) -> None:
        """Give copies another base, and compare with QEMU's own rebase of another copy."""
        with _Copy(self) as top:
            before = _content(self._other), _content(top)
            _qedimg("rebase", "-q", *_ALLOWED, "-b", self._other.name, *self._format_words(), top)
            assert before == (_content(self._other), _content(top))
            assert _own_content(top, self._scratch) == self._content
            assert qemu.check(top).code == 0
            assert qemu.info(top)["backing-filename"] == self._other.name
            self._map(top)
        self.happened["rebase"] += 1

    def _rebase_unsafe(self) -> None:
        """Change only the name of the base: both programs read the same then."""
        with _Copy(self) as top:
            words = ("-b", self._other.name, "-F", _kind(self._other))
            _qedimg("rebase", "-q", "-u", *_ALLOWED, *words, top)
            found = _own_content(top, self._scratch)
            assert found == _content(top)
            with _Copy(self, "theirs.qed") as theirs:
                qemu.run("qemu-img", "rebase", "-u", "-f", "qed", *words, theirs)
                assert found == _content(theirs)
            self.happened["rebase -u: changed" if found != self._content else "rebase -u"] += 1

    def _rebase_to_none(self) -> None:
        with _Copy(self) as top:
            _qedimg("rebase", "-q", *_ALLOWED, "-b", "", top)
            assert _own_content(top, self._scratch) == self._content == _content(top)
            assert "backing-filename" not in qemu.info(top)
            assert qemu.check(top).code == 0

    def _commit(self) -> None:
        """Commit into the own base: refused and nothing changed, or as QEMU does it."""
        base_format = self._formats[1]
        ours, theirs = self._scratch / "ours", self._scratch / "theirs"
        shutil.copytree(self._directory, ours)
        top = ours / self._top.name
        base = ours / qemu.info(top)["backing-filename"]
        if base_format in FORMATS:
            before = _files(ours)
            code, output, complaint = qedimg("commit", "-q", *_ALLOWED, top)
            found = f"found a {base_format} image, which can only be read"
            assert (code, output, found in complaint) == (1, "", True), (code, complaint)
            assert complaint.count("\n") == 1
            assert _files(ours) == before
            self.happened["commit: refused"] += 1
        else:
            shutil.copytree(self._directory, theirs)
            under = _content(base)
            expected = self._content + under[len(self._content) :]
            _qedimg("commit", "-q", *_ALLOWED, top)
            assert _content(base) == expected
            assert _content(top) == self._content
            assert _own_content(top, self._scratch) == self._content
            words = ("qemu-img", "commit", "-q", "-f", "qed", theirs / self._top.name)
            done = qemu.run(*words, codes=(0, 1))
            if not done.returncode:
                found_there = _content(theirs / base.name)
                has_base = "backing-filename" in qemu.info(base)
                assert_like_qemus(found_there, expected, under, has_base=has_base)
                self.happened["commit: compared"] += 1
            self.happened["commit: allowed"] += 1
            shutil.rmtree(theirs)
        shutil.rmtree(ours)

    def _format_words(self) -> tuple[str, ...]:
        """Return the option for the format of the other chain, which is not always needed."""
        return ("-F", _kind(self._other)) if self._random.random() < 0.5 else ()


class _Copy:
    """A copy of the first image of a round beside it; removed at the end of the block."""

    def __init__(self, of: Round, name: str = "ours.qed") -> None:
        self._source = of._top
        self._path = self._source.with_name(name)

    def __enter__(self) -> Path:
        shutil.copyfile(self._source, self._path)
        return self._path

    def __exit__(self, *_error: object) -> None:
        self._path.unlink()


def _qedimg(*words: str | Path) -> str:
    """Run a command that must succeed without a message; return its output."""
    code, output, complaint = qedimg(*words)
    assert (code, complaint) == (0, ""), (words, code, complaint)
    return output


def _kind(path: Path) -> str:
    """Return the format of a file of a round."""
    return path.suffix.removeprefix(".")


def _chain_info(path: Path) -> list[dict[str, Any]]:
    """Return what QEMU says of the images of a chain."""
    words = ("qemu-img", "info", "--backing-chain", "-f", _kind(path), "--output=json", path)
    found: list[dict[str, Any]] = json.loads(qemu.run(*words).stdout)
    return found


def _content(path: Path) -> bytes:
    """Return the content of a disk as QEMU reads it."""
    return qemu.content(path, image_format=_kind(path))


def _own_content(path: Path, scratch: Path) -> bytes:
    """Return the content of a disk as qedfuse reads it."""
    copy = scratch / "own.raw"
    _qedimg("convert", *_ALLOWED, "-O", "raw", path, copy)
    try:
        return copy.read_bytes()
    finally:
        copy.unlink()


def _merged(extents: list[dict[str, Any]], foreign: int) -> list[tuple[object, ...]]:
    """Return the ranges of zeros of a map, and the ranges of data with where they lie.

    Where data lies is the depth of its image, and the distance to its offset in the file.  All
    images from the depth ``foreign`` on count as one, without offsets.  Whether zeros take up space
    does not count.
    """
    found: list[tuple[int, int, object, object]] = []
    for extent in extents:
        begin, end = extent["start"], extent["start"] + extent["length"]
        where: tuple[object, object] = (None, None)
        if not extent["zero"]:
            assert extent["data"]
            depth = min(extent["depth"], foreign)
            where = (depth, extent["offset"] - begin if depth < foreign else None)
        if found and found[-1][2:] == where:
            assert found[-1][1] == begin
            begin = found.pop()[0]
        found.append((begin, end, *where))
    return list(found)


def _offset(text: str) -> int:
    """Return the offset that a comparison has printed."""
    return int(text.strip().split("offset ")[1].split()[0].rstrip("!."))


def _files(directory: Path) -> dict[str, bytes]:
    """Return the content of all files of a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def run_round(seed: int) -> Counter[str]:
    """Run the round of a seed in a temporary directory; return what has happened."""
    with tempfile.TemporaryDirectory() as directory:
        one = Round(Path(directory), seed)
        one.run()
        return one.happened


def main() -> int:
    """Run the rounds that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round")
    arguments = parser.parse_args()
    happened = Counter[str]()
    for seed in range(arguments.seed, arguments.seed + arguments.rounds):
        print(f"seed {seed}", flush=True)  # noqa: T201  output of a script
        happened += run_round(seed)
    for name, count in sorted(happened.items()):
        print(f"{count:7} {name}")  # noqa: T201  output of a script
    print(f"{arguments.rounds} rounds: as QEMU")  # noqa: T201  output of a script
    return 0


if __name__ == "__main__":
    sys.exit(main())
