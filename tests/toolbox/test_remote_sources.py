"""URLs as sources and bases of qedimg: the results of local files, and an exit code for faults."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import qedfuse
from qedfuse.cli.qedimg.main import main
from qedfuse.disk.creation.create import create_image
from qedfuse.disk.options import BackingPolicy, OpenOptions
from qedfuse.errors import BackingRefusedError, RemoteError, UsageError
from qedfuse.remote.address import parse_prefix
from qedfuse.remote.options import Deadlines, RemoteOptions
from tests.support import chains, qemu
from tests.support.disks import build_image
from tests.support.webserver import WebServer, serving, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.webserver import Fault

MIB: Final = 1 << 20
OUTAGE: Final = "what is not in the cache cannot be read"
OPEN_REQUESTS: Final = {
    "info": 1,
    "map": 1,
    "check": 1,
    "measure": 1,
    "dump": 1,
    "convert": 1,
    "compare": 2,
}
"""How many requests each command makes before the fault of a test strikes."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache of each test to itself, and its working directory too."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return directory / "qedfuse"


def run(*words: object, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """Run qedimg; return its output, or its only line of error if ``code`` is not 0."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    if not code:
        assert err == ""
        return out
    assert err.startswith("qedimg: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    return err


def command(name: str, url: object, *options: object) -> list[object]:
    """Return the command line of a command that reads a URL."""
    words: dict[str, list[object]] = {
        "info": [url],
        "map": ["--output", "json", url],
        "check": [url],
        "measure": [url],
        "dump": ["l1", url],
        "convert": ["-O", "raw", url, "copy.raw"],
        "compare": [url, "same"],
    }
    return [name, *options, *words[name]]


def result(*words: object, capsys: pytest.CaptureFixture[str]) -> Any:  # noqa: ANN401  any JSON
    """Run a command that prints JSON; return it without the storage of files."""
    return without_storage(json.loads(run(*words, "--output", "json", capsys=capsys)))


def without_storage(value: Any) -> Any:  # noqa: ANN401
    """Return a JSON value without the names of files, and the space that they use."""
    if isinstance(value, list):
        return [without_storage(item) for item in value]
    if isinstance(value, dict):
        return {
            key: without_storage(item)
            for key, item in value.items()
            if "filename" not in key and key not in {"actual-size", "safety", "problems"}
        }
    return value


def draw_over_url(
    directory: Path, chance: random.Random, server: WebServer
) -> tuple[Path, Path | str]:
    """Make a local chain, and the same chain with the lowest file on the server.

    Returns:
        The top of the local chain, and the top of the other one: a file, or the URL itself.
    """
    local, other = directory / "local", directory / "other"
    local.mkdir()
    top = chains.draw_chain(local, chance, "c", chance.randrange(1, 4))
    (lowest,) = local.glob("c0.*")
    # Holes of a raw file are data on the server.
    server.content = lowest.read_bytes()
    lowest.write_bytes(server.content)
    if top == lowest:
        return top, server.url
    shutil.copytree(local, other)
    (other / lowest.name).unlink()
    first = other / "c1.qed"
    words = ["rebase", "-q", "-u", "-b", server.url, "-F", chains.kind(lowest), str(first)]
    assert main(words) == 0
    return top, other / top.name


@pytest.mark.parametrize("seed", range(12))
def test_results_are_those_of_local_files(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command prints for a URL, or an overlay over one, what it prints for local files."""
    chance = random.Random(seed)
    with serving(b"") as server:
        local, other = draw_over_url(tmp_path, chance, server)
        kind = ("-f", chains.kind(local))
        source = ("-f", chains.kind(local), "--backing-url", server.url)
        for name in ("info", "map", "measure"):
            more = ("--backing-chain",) if name == "info" else ()
            expected = result(name, *more, *kind, local, capsys=capsys)
            assert result(name, *more, *source, other, capsys=capsys) == expected
        run("convert", "-O", "raw", *source, other, "copy.raw", capsys=capsys)
        assert (tmp_path / "work" / "copy.raw").read_bytes() == chains.content(local)
        # One side as the raw copy, because compare takes one format for each side.
        said = run("compare", *source, "-F", "raw", other, "copy.raw", capsys=capsys)
        assert said.endswith("Images are identical.\n")
        if chains.kind(local) == "qed":
            expected = result("info", "--allocation", local, capsys=capsys)
            assert result("info", "--allocation", other, capsys=capsys) == expected
            expected = result("check", local, capsys=capsys)
            assert result("check", other, capsys=capsys) == expected
            dumped = run("dump", "l1", local, capsys=capsys)
            assert run("dump", "l1", other, capsys=capsys) == dumped
        assert server.requests


@pytest.mark.parametrize("name", ["info", "check", "map"])
def test_a_damaged_image_on_a_server(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image with an invalid entry gets the same findings and exit code as a local one."""
    content = bytearray(build_image(MIB, table_size=2))
    path = tmp_path / "bad.qed"
    path.write_bytes(content)
    l1_offset = int.from_bytes(content[40:48], "little")
    content[l1_offset : l1_offset + 8] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(content)
    with serving(bytes(content)) as server:
        outputs = []
        for image in (str(path), server.url):
            capsys.readouterr()
            code = main([name, image])
            out, err = capsys.readouterr()
            said = (out + err).replace(image, "IMAGE")
            lines = [line for line in said.splitlines() if not line.startswith("disk size:")]
            outputs.append((code, lines))
    assert outputs[0] == outputs[1]


@pytest.mark.expect_log("although the name ends with .raw")
def test_an_image_in_a_raw_object_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A URL whose path ends with .raw, and whose content is an image, is not read silently."""
    with serving(bytes(build_image(MIB))) as server:
        for url in (server.url, server.url.replace("disk.qed", "disk.raw?signature=secret")):
            assert not caplog.messages
            assert main(["measure", url]) == 0
    (line,) = caplog.messages
    assert "/disk.raw?...: found a QED image" in line
    assert "secret" not in line


# --- making overlays ------------------------------------------------------------------


@pytest.mark.parametrize("base_format", ["qed", "raw"])
def test_qemu_reads_an_overlay_over_a_url(
    base_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An overlay over a URL has the size of the base, and QEMU reads it like qedfuse."""
    chance = random.Random(7)
    base = tmp_path / f"base.{base_format}"
    draw = chains.draw_image if base_format == "qed" else chains.draw_raw
    draw(base, chance)
    with serving(base.read_bytes()) as server:
        run("create", "-b", server.url, "-F", base_format, "over.qed", capsys=capsys)
        assert qemu.info("over.qed")["backing-filename"] == server.url
        qemu.io("over.qed", "write -P 5 4k 8k", image_format="qed")
        words = ("convert", "-O", "raw", "--backing-url", server.url, "over.qed", "copy.raw")
        run(*words, capsys=capsys)
        chain = json.loads(
            qemu.run("qemu-img", "info", "--backing-chain", "--output=json", "over.qed").stdout
        )
        assert [layer["format"] for layer in chain] == ["qed", base_format]
        theirs = qemu.content_over_url("over.qed", server.url, base_format=base_format)
    assert (tmp_path / "work/copy.raw").read_bytes() == theirs


def test_a_copy_over_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Convert -B stores only the difference to a base on a server, and measure -B counts it."""
    base = chains.draw_image(tmp_path / "base.qed", random.Random(3))
    with serving(base.read_bytes()) as server:
        over = ("-B", server.url, "-F", "qed")
        measured = result("measure", *over, base, capsys=capsys)["required"]
        run("convert", "--compare", *over, base, "thin.qed", capsys=capsys)
        assert (tmp_path / "work" / "thin.qed").stat().st_size == measured
        allowed = ("--backing-url", server.url)
        alone = run("info", "thin.qed", capsys=capsys)
        assert "found a URL, which must be allowed" in alone
        other = run("info", "--backing-url", "https://example.org/", "thin.qed", capsys=capsys)
        assert "must be allowed" in other
        assert "must be allowed" not in run("info", *allowed, "thin.qed", capsys=capsys)
        chain = run("info", "--backing-chain", *allowed, "thin.qed", capsys=capsys)
        assert chain.count("\nfile format: qed") == 2
        assert "must be allowed" not in chain
        assert "identical" in run("compare", *allowed, "thin.qed", base, capsys=capsys)
        assert qemu.info("thin.qed")["backing-filename"] == server.url


def test_an_overlay_gets_a_base_on_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rebase moves an overlay from a local base to a URL, and back."""
    base = chains.draw_image(tmp_path / "base.qed", random.Random(4))
    over = chains.draw_image(tmp_path / "over.qed", random.Random(5), base)
    expected = chains.content(over)
    with serving(base.read_bytes()) as server:
        allowed = ("--backing-url", server.url)
        run("rebase", "-b", server.url, "-F", "qed", over, capsys=capsys)
        run("convert", "-O", "raw", *allowed, over, "copy.raw", capsys=capsys)
        run("rebase", *allowed, "-b", "base.qed", "-F", "qed", over, capsys=capsys)
    assert (tmp_path / "work" / "copy.raw").read_bytes() == expected
    assert chains.content(over) == expected


def test_an_unsafe_overlay_is_made_without_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    """Create -u stores the name unchanged and asks no server."""
    with serving(b"") as server:
        run("create", "-u", "-b", server.url, "-F", "qed", "over.qed", "1M", capsys=capsys)
        value = json.loads(run("info", "--output", "json", "over.qed", capsys=capsys))
        assert value["backing-filename"] == server.url
        assert value["problems"][0]["code"] == "backing-url"
        assert not server.requests


def test_a_query_in_an_image_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """No output has the query of a URL that an image names, nor that of a URL that was given."""
    with serving(bytes(build_image(MIB))) as server:
        url = f"{server.url}?token=secret"
        trio.run(partial(create_image, "over.qed", MIB, backing=url))
        for words in (("info",), ("info", "--output", "json")):
            for image in ("over.qed", url):
                said = run(*words, image, capsys=capsys)
                assert f"{server.url}?..." in said
                assert "secret" not in said
        assert "secret" not in run("map", "over.qed", capsys=capsys, code=17)


@pytest.mark.parametrize(
    "words",
    [
        ("check",),
        ("check", "--output", "json"),
        ("map",),
        ("map", "--output", "json"),
        ("map", "--output", "svg"),
        ("dump", "header", "--output", "json"),
        ("dump", "l1", "--output", "json"),
        ("dump", "header"),
        ("measure", "--output", "json"),
        ("compare", "same.qed", "--output", "json"),
        ("compare", "same.qed"),
        ("warm",),
    ],
)
def test_no_output_shows_a_query(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No command that reads a URL prints its query."""
    content = bytes(build_image(MIB))
    (tmp_path / "work" / "same.qed").write_bytes(content)
    with serving(content) as server:
        said = run(*words, f"{server.url}?token=secret", capsys=capsys)
    assert said
    assert "secret" not in said


def test_a_warning_does_not_show_a_query() -> None:
    """The warning about a file that was not closed, and the name of its thread, hide the query."""
    with serving(bytes(build_image(MIB))) as server:
        file = qedfuse.open(f"{server.url}?token=secret")
        assert not [thread for thread in threading.enumerate() if "secret" in thread.name]
        with pytest.warns(ResourceWarning, match="unclosed disk") as caught:
            file.__del__()
        assert "secret" not in str(caught[0].message)
        file.close()


@pytest.mark.parametrize(
    "words",
    [
        ("create", "-b", "URL", "new.qed"),
        ("create", "-u", "-b", "URL", "-F", "qed", "new.qed", "1M"),
        ("convert", "-O", "qed", "-B", "URL", "old.qed", "new.qed"),
        ("rebase", "-b", "URL", "old.qed"),
        ("rebase", "-u", "-b", "URL", "-F", "qed", "old.qed"),
    ],
)
def test_a_query_is_not_stored(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No command stores a URL with a query, which may be a secret, in an image."""
    old = tmp_path / "work" / "old.qed"
    content = bytes(build_image(MIB))
    old.write_bytes(content)
    with serving(content) as server:
        given = [word.replace("URL", f"{server.url}?token=secret") for word in words]
        line = run(*given, capsys=capsys, code=1)
    assert line == (
        f"qedimg: {server.url}?...: found a URL with a query, expected one without, because the "
        "overlay stores the URL\n"
    )
    assert old.read_bytes() == content
    assert [path.name for path in old.parent.iterdir()] == ["old.qed"]


@pytest.mark.parametrize(
    ("words", "content", "reason"),
    [
        (("-F", "qed"), b"no image" * 100, "found no QED magic"),
        ((), b"no image" * 100, "-F raw for any other content"),
        (("-F", "qed"), bytes(build_image(MIB)[:4096]), "header field"),
    ],
)
def test_a_base_of_another_format(
    words: tuple[str, ...], content: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Create refuses a base on a server that is not what -F says, and makes no image."""
    with serving(content) as server:
        line = run("create", "-b", server.url, *words, "over.qed", capsys=capsys, code=17)
    assert reason in line
    assert line.startswith(f"qedimg: over.qed: backing file {server.url}: ")
    assert not list(Path.cwd().iterdir())


# --- chains on servers ----------------------------------------------------------------


def test_a_chain_on_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A relative name in an image on a server is a URL in the same directory of the server."""
    base = chains.draw_image(tmp_path / "base.qed", random.Random(8))
    top = chains.draw_image(tmp_path / "top.qed", random.Random(9), base)
    with serving(top.read_bytes()) as server:
        server.others["/images/base.qed"] = base.read_bytes()
        url = f"{server.url}?version=/1"
        refused = run("map", url, capsys=capsys, code=17)
        assert f"{server.url.replace('disk.qed', 'base.qed')}: refused: found a URL" in refused
        prefix = server.url.rpartition("/")[0]
        run("convert", "-O", "raw", "--backing-url", prefix, url, "copy.raw", capsys=capsys)
        value = json.loads(run("info", "--output", "json", url, capsys=capsys))
        assert value["full-backing-filename"] == f"{prefix}/base.qed"
        assert value["safety"]["escapes-directory"] is False
    assert (tmp_path / "work" / "copy.raw").read_bytes() == chains.content(top)


@pytest.mark.parametrize("name", ["/etc/hostname", "file:secret.raw", "{cwd}/secret.raw"])
def test_an_image_on_a_server_names_no_local_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image on a server whose base is a local file is refused, and info says so."""
    (tmp_path / "work" / "secret.raw").write_bytes(bytes(MIB))
    name = name.format(cwd=tmp_path / "work")
    with serving(bytes(build_image(MIB, backing=name.encode()))) as server:
        for mode in ("confined", "any"):
            line = run("map", "--backing", mode, server.url, capsys=capsys, code=17)
            assert "found a local file, expected a URL" in line
        value = json.loads(run("info", "--output", "json", server.url, capsys=capsys))
    assert [item["code"] for item in value["problems"]] == ["backing-local"]
    assert value["safety"]["safe-to-mount"] is False


def test_a_file_after_file_is_local(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that begins with file:// is a path and no URL."""
    base = qemu.create(tmp_path / "base.qed", MIB)
    run("create", "-b", f"file://{base}", "over.qed", capsys=capsys)
    words = ("info", "--backing-chain", "--backing", "any", "over.qed")
    assert run(*words, capsys=capsys).count(f"image: //{base}\n") == 1


# --- faults ---------------------------------------------------------------------------

REPEATED: Final[set[Fault]] = {"status 503", "reset", "garbage", "silence", "half", "stall"}
"""Faults after which a request is repeated until its time is over."""


def patience(fault: Fault) -> tuple[str, str]:
    """Return a time limit that is short if the whole of it passes, and long if none of it does."""
    return "--remote-timeout", "0.3" if fault in REPEATED else "60"


AT_OPENING: Final[dict[Fault, str]] = {
    "status 404": "found no such object",
    "status 403": "refused: found HTTP status 403",
    "status 503": "found HTTP status 503 (attempts: ",
    "status 418": "found HTTP status 418, expected 206",
    "no range": "found HTTP status 200 without a range",
    "redirect elsewhere": "found a redirection to https://example.org/x?..., expected",
    "redirect loop": "redirections",
    "reset": "(attempts: ",
    "garbage": "(attempts: ",
    "silence": "(attempts: ",
}


@pytest.mark.parametrize("name", OPEN_REQUESTS)
@pytest.mark.parametrize("fault", AT_OPENING)
def test_faults_at_opening(
    name: str, fault: Fault, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that fails from the beginning gets one line and the exit code, and no target."""
    (tmp_path / "work" / "same").write_bytes(bytes(MIB))
    code = {"status 404": 26, "status 403": 27}.get(fault, 22)
    codes = {"check": 1, "compare": 2}
    with serving(bytes(build_image(MIB))) as server:
        server.elsewhere = "https://example.org/x?token=secret"
        server.always = fault
        words = command(name, f"{server.url}?key=secret", *patience(fault))
        line = run(*words, capsys=capsys, code=codes.get(name, code))
        assert server.struck[fault]
    assert line.startswith(f"qedimg: {server.url}?...: ")
    assert AT_OPENING[fault] in line
    assert "secret" not in line
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["same"]


@pytest.mark.parametrize("name", OPEN_REQUESTS)
@pytest.mark.parametrize(
    ("fault", "code"), [("other etag", 23), ("half", 22), ("status 404", 23), ("stall", 22)]
)
@pytest.mark.expect_log(OUTAGE)
def test_faults_while_reading(
    name: str, fault: Fault, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that fails after the opening gets one line and the exit code, and no target."""
    path = tmp_path / "disk.qed"
    qemu.create(path, 8 * MIB)
    qemu.io(path, "write -P 3 0 8M", image_format="qed")
    (tmp_path / "work" / "same").write_bytes(bytes([3]) * (8 * MIB))
    codes = {"check": 1, "compare": 4}
    with serving(path.read_bytes()) as server:
        server.healthy = OPEN_REQUESTS[name]
        server.always = fault
        words = command(name, server.url, *patience(fault))
        line = run(*words, capsys=capsys, code=codes.get(name, code))
        assert server.struck[fault]
        assert not server.healthy
    assert line.startswith(f"qedimg: {server.url}: found ") or "(attempts: " in line
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["same"]


def test_an_unpinned_file_needs_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    """A file of which only the size is known is read with --allow-unpinned only."""
    with serving(bytes(build_image(MIB))) as server:
        server.etag, server.modified = "", None
        line = run("info", server.url, capsys=capsys, code=22)
        assert "found neither a strong ETag nor a Last-Modified header" in line
        run("info", "--allow-unpinned", server.url, capsys=capsys)


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (("http://192.0.2.1/x",), 1, "found http:// to another machine"),
        (("ftp://192.0.2.1/x",), 1, "found ftp://, expected one of s3://"),
        (("https://user:secret@host/x",), 1, "URL user: found one, expected none"),
        (("--backing-url", "images", "x.qed"), 1, "found no scheme"),
        (("--cache-dir", "", "x.qed"), 1, "argument --cache-dir: found '', expected a path"),
        (("--remote-timeout", "0", "x.qed"), 1, "expected seconds, more than 0"),
        (("--remote-timeout", "nan", "x.qed"), 1, "expected seconds, more than 0"),
        (("--remote-connect-timeout", "-1", "x.qed"), 1, "expected seconds, more than 0"),
        (("--credentials", "missing", "https://host/x"), 1, "cannot open"),
        (("--credentials", "open", "https://host/x"), 1, "expected none for the group"),
    ],
)
def test_invalid_arguments(
    words: tuple[str, ...],
    code: int,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A URL or an option that is not valid gets a line that shows no secret, and no request."""
    (tmp_path / "work" / "x.qed").write_bytes(bytes(build_image(MIB)))
    (tmp_path / "work" / "open").write_text("AWS_SECRET_ACCESS_KEY=secret\n")
    (tmp_path / "work" / "open").chmod(0o640)
    line = run("map", *words, capsys=capsys, code=code)
    assert reason in line
    assert "secret" not in line


def test_the_cache_has_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--cache-dir names the cache, from which a file is read that the server does not give now."""
    path = qemu.create(tmp_path / "disk.qed", MIB)
    kept = tmp_path / "kept"
    with serving(path.read_bytes()) as server:
        words = ("convert", "-O", "raw", "--cache-dir", kept, server.url)
        run(*words, "one.raw", capsys=capsys)
        assert (kept.stat().st_mode & 0o777) == 0o700
        sent = server.sent_bytes
        run(*words, "two.raw", capsys=capsys)
        assert server.sent_bytes - sent < 16  # the question for the version, a byte each
    work = tmp_path / "work"
    assert (work / "one.raw").read_bytes() == (work / "two.raw").read_bytes()


@pytest.mark.parametrize("source_format", ["raw", "qed"])
def test_ctrl_c_while_a_server_is_silent(source_format: str, tmp_path: Path) -> None:
    """A signal ends a copy whose server does not answer, soon and without a target."""
    path = qemu.create(tmp_path / "disk.qed", 8 * MIB)
    qemu.io(path, "write -P 3 0 8M", image_format="qed")
    with serving(path.read_bytes()) as server:
        # Of a raw file the first range after the opening is read in a worker thread, and of an
        # image by the event loop.
        server.healthy = 1
        server.always = "silence"
        options = ("-f", source_format, server.url, "copy.qed")
        words = [sys.executable, "-m", "qedfuse.cli.qedimg", "convert", *options]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: server.struck["silence"], 30)
        process.send_signal(signal.SIGINT)
        # Without the signal the copy fails after more than 60 seconds.
        _out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "qedimg: interrupted\n")
    assert not list((tmp_path / "work").iterdir())


# --- URLs as targets ------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "commit URL",
        "commit -d URL",
        "commit over.qed",
        "commit --backing-url URL over.qed",
        "commit -b URL over.qed",
        "resize URL +1M",
        "rebase -b x URL",
        "rebase -u -b x -F qed URL",
        "compact URL",
        "check -r all URL",
        "check -r leaks --dry-run URL",
        "check --undo over.qed URL",
        "freelist show URL",
        "freelist on URL",
        "freelist off URL",
        "create URL 1M",
        "create --force URL 1M",
        "convert over.qed URL",
        "convert --force over.qed URL",
        "convert -n over.qed URL",
        "convert -O raw over.qed URL",
        "convert -O qcow2 over.qed URL",
    ],
)
def test_no_command_writes_to_a_url(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that would change a URL is refused before it changes anything."""
    with serving(bytes(build_image(MIB))) as server:
        run("create", "-b", server.url, "-F", "qed", "over.qed", capsys=capsys)
        over = Path("over.qed")
        before = over.read_bytes()
        line = run(*words.replace("URL", server.url).split(), capsys=capsys, code=1)
        assert line == (
            f"qedimg: {server.url}: found a URL, expected a local file (URLs can only be read)\n"
        )
        assert over.read_bytes() == before
        assert list(Path.cwd().iterdir()) == [Path.cwd() / "over.qed"]


# --- qedfuse.open ---------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path: Path) -> Iterator[tuple[WebServer, bytes]]:
    """Serve a random image; yield the server and the content of the disk."""
    path = chains.draw_image(tmp_path / "disk.qed", random.Random(11))
    with serving(path.read_bytes()) as server:
        yield server, chains.content(path)


def test_a_file_object_reads_a_url(drawn: tuple[WebServer, bytes]) -> None:
    """qedfuse.open reads the disk in an image on a server."""
    server, expected = drawn
    with qedfuse.open(server.url) as disk:
        assert (disk.name, disk.size) == (server.url, len(expected))
        disk.seek(4321)
        assert disk.read(100_000) == expected[4321:104_321]
        disk.seek(0)
        assert disk.read() == expected


def test_a_file_object_does_not_write_to_a_url(drawn: tuple[WebServer, bytes]) -> None:
    """qedfuse.open refuses a URL with the mode r+b, and asks no server."""
    server, _expected = drawn
    with pytest.raises(UsageError, match="found a URL, expected a local file"):
        qedfuse.open(server.url, "r+b")
    assert not server.requests


def test_a_file_object_over_a_url(
    drawn: tuple[WebServer, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """qedfuse.open writes to an overlay over a URL, which its options must allow."""
    server, expected = drawn
    run("create", "-b", server.url, "-F", "qed", "over.qed", capsys=capsys)
    with pytest.raises(BackingRefusedError, match="allow it with backing_url"):
        qedfuse.open("over.qed", options=OpenOptions(backing=BackingPolicy("any")))
    options = OpenOptions(remote=RemoteOptions(allowed=(parse_prefix(server.url),)))
    with qedfuse.open("over.qed", "r+b", options=options) as disk:
        disk.write(b"here")
        disk.seek(0)
        assert disk.read() == b"here" + expected[4:]
    assert trio.run(_read, options) == b"here" + expected[4:]


async def _read(options: OpenOptions) -> bytes:
    """Return the content of the overlay through the asynchronous interface."""
    async with qedfuse.open_disk("over.qed", options) as disk:
        return bytes(await disk.read(0, disk.size))


def test_a_file_object_of_a_server_that_fails(drawn: tuple[WebServer, bytes]) -> None:
    """qedfuse.open raises RemoteError with the reason if the server has no such file."""
    server, _expected = drawn
    server.always = "status 404"
    options = OpenOptions(remote=RemoteOptions(deadlines=Deadlines(0.3, 0.3, 0.3)))
    with pytest.raises(RemoteError, match="found no such object"):
        qedfuse.open(server.url, options=options)
    assert server.struck["status 404"]
