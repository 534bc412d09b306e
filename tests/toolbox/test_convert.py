"""``qedimg convert`` compared with ``qemu-img convert``: equal disks, no errors, no leftovers."""

from __future__ import annotations

import errno
import json
import os
import random
import select
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio
import trio.testing

from qedfuse.cli.qedimg.main import main
from qedfuse.errors import HostError, NoSpaceError
from qedfuse.tools.common.pipe import open_stream
from qedfuse.tools.copying import conversion, diskcopy
from qedfuse.tools.copying.compare import verify_copy
from qedfuse.tools.copying.convert import convert
from qedfuse.tools.copying.imagespec import ImageSpec
from tests.support import chains, qemu
from tests.support.devices import loop_device
from tests.support.disks import header_of, l2_entry_offset, put_entry
from tests.support.fakecommand import finish, start
from tests.support.share import share
from tests.toolbox import memory

if TYPE_CHECKING:
    from qedfuse.tools.source.source import Source


def names(directory: Path) -> set[str]:
    """List a directory, hidden files included."""
    return set(os.listdir(directory))  # noqa: PTH208  names, not paths


def assert_sound(path: Path, *, leaks: bool = False) -> None:
    """Assert that QEMU finds neither errors nor leaks.

    With ``leaks`` there may be free clusters, which are leaks for QEMU.
    """
    found = qemu.check(path)
    assert found.errors == 0, found.text
    assert leaks or found.code == 0, found.text


def geometry(chance: random.Random) -> list[str]:
    """Draw a geometry that QEMU can open."""
    # QEMU requires that the range of the tables fits into 64 bits.
    cluster, table = 1 << chance.randrange(12, 21), 1 << chance.randrange(1, 5)
    return ["--cluster-size", str(cluster), "--table-size", str(table)]


def stored(path: Path) -> int:
    """Return the bytes of a file that are not in holes.

    st_blocks would count the host's extent blocks as well.
    """
    count = at = 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            count += at - start
    return count


@pytest.mark.parametrize("seed", range(share(8, of=24)))
def test_a_chain_becomes_one_image(seed: int, tmp_path: Path) -> None:
    """Any chain converts into a QED and a raw disk of the same content and of minimal length."""
    chance = random.Random(seed)
    top = chains.draw_chain(tmp_path, chance, "c", chance.randrange(1, 4))
    form = chains.kind(top)
    before = names(tmp_path)
    streams = ["-m", str(chance.randrange(1, 5)), "--backing", "any"]
    image, raw = tmp_path / "copy.qed", tmp_path / "copy.raw"
    words = [*geometry(chance), *streams, "--compare"]
    assert main(["convert", "-f", form, *words, str(top), str(image)]) == 0
    assert main(["convert", "-f", form, "-O", "raw", *streams, str(top), str(raw)]) == 0
    assert names(tmp_path) == before | {image.name, raw.name}
    assert_sound(image)
    expected = chains.content(top)
    assert raw.read_bytes() == expected
    assert chains.content(image) == expected
    header = header_of(image.read_bytes())
    data = sum(
        any(expected[at : at + header.cluster_size])
        for at in range(0, len(expected), header.cluster_size)
    )
    spans = sum(
        any(expected[at : at + header.geometry.table_span])
        for at in range(0, len(expected), header.geometry.table_span)
    )
    tables = (1 + spans) * header.geometry.table_bytes
    assert image.stat().st_size == header.cluster_size * (1 + data) + tables
    theirs = qemu.convert(top, tmp_path / "theirs.raw", source_format=form)
    assert stored(raw) <= stored(theirs)


@pytest.mark.parametrize("seed", range(share(6, of=16)))
def test_an_overlay_holds_what_differs(seed: int, tmp_path: Path) -> None:
    """With -B the new image reads as the source and holds only what differs from the base."""
    chance = random.Random(f"overlay {seed}")
    source = chains.draw_chain(tmp_path, chance, "c", chance.randrange(2, 4))
    if chance.random() < 0.5:
        base = chains.draw_chain(tmp_path, chance, "b", chance.randrange(1, 3))
    else:
        base = next(path for path in tmp_path.iterdir() if path.stem == "c0")
    new = tmp_path / "new.qed"
    words = ["-B", base.name, "-F", chains.kind(base), *geometry(chance)]
    assert main(["convert", *words, "--compare", str(source), str(new)]) == 0
    assert_sound(new)
    assert chains.content(new) == chains.content(source)
    assert qemu.info(new)["backing-filename"] == base.name
    rest = new.with_name("rest.qed")
    assert main(["convert", *words, str(base), str(rest)]) == 0
    header = header_of(rest.read_bytes())
    assert rest.stat().st_size == header.l1_end, "nothing differs from itself"


def test_zeros_over_a_base_are_zero_clusters(tmp_path: Path) -> None:
    """Zeros over data of the base become zero clusters, which take no space."""
    qemu.create(tmp_path / "base.qed", 1 << 20)
    qemu.io(tmp_path / "base.qed", f"write -P 7 0 {1 << 20}")
    source = tmp_path / "source.raw"
    source.write_bytes(bytes([7]) * (1 << 19) + bytes(1 << 19))
    new = tmp_path / "new.qed"
    assert main(["convert", "-B", "base.qed", str(source), str(new)]) == 0
    header = header_of(new.read_bytes())
    assert new.stat().st_size == header.l1_end + header.geometry.table_bytes
    assert chains.content(new) == source.read_bytes()
    assert_sound(new)


@pytest.mark.parametrize("seed", range(8))
def test_convert_into_an_existing_disk(seed: int, tmp_path: Path) -> None:
    """With -n the target gets the source's content and keeps its own past the source's end."""
    chance = random.Random(f"existing {seed}")
    source = chains.draw_chain(tmp_path, chance, "c", chance.randrange(1, 3))
    form, wanted = chains.kind(source), chains.content(source)
    size = len(wanted) + 512 * chance.choice([0, 1, 3000])
    old = bytearray(chance.randbytes(4096) * (size // 4096 + 1))[:size]
    raw, image = tmp_path / "old.raw", tmp_path / "old.qed"
    raw.write_bytes(old)
    assert main(["convert", "-f", "raw", *geometry(chance), str(raw), str(image)]) == 0
    for target, found in ((raw, "raw"), (image, "qed")):
        words = ["-f", form, "-n", "-O", found, "--compare", str(source), str(target)]
        assert main(["convert", *words]) == 0
        assert chains.content(target) == wanted + old[len(wanted) :]
    assert_sound(image, leaks=True)


def test_the_reported_length_is_that_after_the_close(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """-n -v reports the length that an existing image has when its free end has been cut off."""
    path, source = qemu.create(tmp_path / "full.qed", 4 << 20), tmp_path / "zeros.raw"
    qemu.io(path, "write -P 1 0 4M")
    before = path.stat().st_size
    source.touch()
    os.truncate(source, 4 << 20)
    assert main(["convert", "-n", "-v", "-O", "qed", str(source), str(path)]) == 0
    after = path.stat().st_size
    assert after < before
    assert f"file of {after} bytes" in capsys.readouterr().out


def test_devices(tmp_path: Path) -> None:
    """A block device is a source, and with -n a target."""
    chance = random.Random(5)
    content = chance.randbytes(1 << 20) + bytes(1 << 20) + chance.randbytes(1 << 20)
    raw, image, target = tmp_path / "a.raw", tmp_path / "a.qed", tmp_path / "b.raw"
    raw.write_bytes(content)
    target.write_bytes(b"x" * len(content))
    with loop_device(raw) as device:
        assert main(["convert", device, str(image)]) == 0
    with loop_device(target) as device:
        assert main(["convert", "-O", "raw", str(image), device]) == 1
        assert main(["convert", "-n", "-O", "raw", str(image), device]) == 0
    assert_sound(image)
    assert target.read_bytes() == content


@pytest.mark.parametrize(("sparse", "holes"), [("0", 0), ("4k", 3), ("64k", 1), ("512", 4)])
def test_sparse_sizes(sparse: str, holes: int, tmp_path: Path) -> None:
    """Runs of zeros become holes from the length that -S gives."""
    data, content, lengths = b"d" * 4096, b"", (512, 4096, 8192, 1 << 17)
    for length in lengths:
        content += data + bytes(length)
    content += b"d" * (-len(content) % 4096)
    raw, new = tmp_path / "a.raw", tmp_path / "new.raw"
    raw.write_bytes(content)
    assert main(["convert", "-S", sparse, "-f", "raw", "-O", "raw", str(raw), str(new)]) == 0
    assert new.read_bytes() == content
    missing = (len(content) - new.stat().st_blocks * 512) >> 12
    assert (missing > 0) is (holes > 0), missing
    assert (missing < 30) is (holes == 0), missing
    image = tmp_path / "new.qed"
    words = ["-S", sparse, "--cluster-size", "4k", "-f", "raw", str(raw), str(image)]
    assert main(["convert", *words]) == 0
    assert_sound(image)
    full = qemu.check(image).data["allocated-clusters"] * 4096 >= len(content)
    assert full is (sparse == "0")


@pytest.mark.parametrize("seed", range(3))
def test_pipes(seed: int, tmp_path: Path) -> None:
    """Raw content is read from a pipe of unknown length and written to one in full."""
    chance = random.Random(f"pipe {seed}")
    content = chance.randbytes(3 << 20) + bytes(5 << 20) + chance.randbytes(chance.randrange(9999))
    program = [sys.executable, "-m", "qedfuse.cli.qedimg", "convert"]
    image, fifo = tmp_path / "a.qed", tmp_path / "fifo"
    words = [*program, *geometry(chance), "-", str(image)]
    subprocess.run(words, input=content, check=True)
    assert_sound(image)
    padded = content + bytes(-len(content) % 512)
    assert qemu.content(image) == padded
    words = [*program, "-O", "raw", str(image), "-"]
    assert subprocess.run(words, capture_output=True, check=True).stdout == padded
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(content,))
    writer.start()
    assert main(["convert", "-O", "raw", str(fifo), str(tmp_path / "b.raw")]) == 0
    writer.join()
    assert (tmp_path / "b.raw").read_bytes() == content
    assert names(tmp_path) == {"a.qed", "b.raw", "fifo"}


@pytest.mark.parametrize("form", ["raw", "qed"])
@pytest.mark.parametrize("length", [1, 66_000, 1 << 17, (1 << 20) + 7])
def test_a_pipe_reports_the_same_data_as_a_file(tmp_path: Path, form: str, length: int) -> None:
    """A source counts the same bytes of data as a pipe and as a file."""
    content = bytes(1 << 20) + random.Random(length).randbytes(length)
    raw, fifo = tmp_path / "a.raw", tmp_path / "fifo"
    raw.write_bytes(content)
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(content,))
    writer.start()
    layout = ImageSpec(form)
    piped = trio.run(convert, str(fifo), str(tmp_path / "b"), layout)
    writer.join()
    copied = trio.run(convert, str(raw), str(tmp_path / "c"), layout)
    assert piped.data_bytes == copied.data_bytes
    assert piped.data_bytes == length


async def test_the_name_of_a_fifo_is_printable(tmp_path: Path) -> None:
    """A read of a FIFO that fails has a message of one line, also if the name has two."""
    fifo = tmp_path / "a\nb"
    os.mkfifo(fifo)
    descriptor = os.open(fifo, os.O_RDWR)
    stream = await open_stream(str(fifo), os.O_WRONLY)
    try:
        with pytest.raises(HostError) as caught:
            await stream.read(memoryview(bytearray(1)))
    finally:
        stream.close()
        os.close(descriptor)
    assert str(caught.value) == f"{tmp_path}/a\\nb: read: Bad file descriptor"


async def test_a_cancelled_wait_for_a_fifo_leaves_no_reader(tmp_path: Path) -> None:
    """After a cancellation a program that opens the other end finds no reader that never reads."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_stream, str(fifo), os.O_RDONLY)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    writer = os.open(fifo, os.O_WRONLY)  # succeeds when the abandoned thread has opened the FIFO
    try:
        poll = select.poll()
        poll.register(writer, 0)
        assert poll.poll(60_000) == [(writer, select.POLLERR)]
    finally:
        os.close(writer)


@pytest.mark.parametrize("words", ["fifo new", "-O raw a.raw fifo"])
def test_ctrl_c_while_a_fifo_has_no_other_end(words: str, tmp_path: Path) -> None:
    """SIGINT ends the wait for the other end of a FIFO."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a.raw").write_bytes(b"x" * 5000)
    script = (
        "import os, signal, sys\n"
        "real = os.open\n"
        "def opening(path, *arguments, **named):\n"
        "    if path == 'fifo':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(path, *arguments, **named)\n"
        "os.open = opening\n"
        "from qedfuse.cli.qedimg.main import main\n"
        "sys.exit(main(['convert', *sys.argv[1:]]))"
    )
    done = finish(start([sys.executable, "-c", script, *words.split()], directory=tmp_path))
    assert (done[0], done[2]) == (130, "qedimg: interrupted\n")
    assert names(tmp_path) == {"a.raw", "fifo"}


@pytest.mark.parametrize("form", ["qcow2", "vmdk", "vdi", "vpc"])
def test_other_formats(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other formats are made by qemu-img, under any name, and no temporary file remains."""
    chance = random.Random(form)
    source = chains.draw_image(tmp_path / "a.qed", chance)
    monkeypatch.chdir(tmp_path)
    for directory in ("a:b", "-c", str(tmp_path / "d")):
        Path(directory).mkdir()
        new = f"{directory}/new.{form}"
        assert main(["convert", "-O", form, "--", "a.qed", new]) == 0
        assert qemu.compare(source, tmp_path / new, second_format=form)
        assert qemu.info(tmp_path / new)["format"] == form
        assert names(Path(directory)) == {f"new.{form}"}


@pytest.mark.parametrize(("sparse", "is_data"), [("0", True), ("1000", False), ("1G", False)])
def test_sparse_sizes_in_other_formats(sparse: str, is_data: bool, tmp_path: Path) -> None:  # noqa: FBT001
    """Any -S is valid for other formats too, and with -S 0 zeros are written as data."""
    (tmp_path / "a.raw").write_bytes(bytes(1 << 20))
    new = tmp_path / "new.qcow2"
    assert main(["convert", "-S", sparse, "-O", "qcow2", str(tmp_path / "a.raw"), str(new)]) == 0
    found = json.loads(qemu.run("qemu-img", "map", "--output=json", new).stdout)
    assert [item["data"] for item in found] == [is_data]


def test_an_image_that_replaces_a_private_file_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of another format leaves the private directory only with a private mode."""
    source, target = tmp_path / "a.raw", tmp_path / "new.qcow2"
    source.write_bytes(b"x" * 5000)
    real, modes = os.replace, []

    def replace(old: str, new: str) -> None:
        modes.append(stat.S_IMODE(Path(old).stat().st_mode))
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    before = os.umask(0o022)
    try:
        assert main(["convert", "-O", "qcow2", str(source), str(target)]) == 0
        assert modes.pop(0) == stat.S_IMODE(target.stat().st_mode) == 0o644
        target.chmod(0o600)
        modes.clear()
        assert main(["convert", "--force", "-O", "qcow2", str(source), str(target)]) == 0
    finally:
        os.umask(before)
    # The first call moves the image out of its directory, the second gives it the final name.
    assert modes == [0o600, 0o600]


REFUSED_CALLS: Final = {
    "mkdir": "/image",
    "open": "/raw",
    "listdir": "/image",
    "unlink": "/image/new.qcow2",
    "replace": "/image/new.qcow2",
}


@pytest.mark.parametrize("call", REFUSED_CALLS)
def test_a_host_that_refuses_a_temporary_file_of_a_foreign_image(
    call: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A refusal of the host is one line with the name of the target, and no file is left."""
    real, refused = getattr(os, call), []

    def refusing(path: str, *arguments: object, **named: object) -> object:
        if str(path).endswith(REFUSED_CALLS[call]):
            refused.append(path)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), path)
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, call, refusing)
    (tmp_path / "a.raw").write_bytes(b"x" * 5000)
    target = tmp_path / "new.qcow2"
    assert main(["convert", "-O", "qcow2", str(tmp_path / "a.raw"), str(target)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qedimg: {target}: cannot ")
    assert said.endswith(": Disk quota exceeded\n")
    assert said.count("\n") == 1
    with pytest.raises(NoSpaceError):
        trio.run(convert, str(tmp_path / "a.raw"), str(target), ImageSpec("qcow2"))
    assert len(refused) == 2
    monkeypatch.undo()
    assert names(tmp_path) == {"a.raw"}


def test_a_new_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file that the host does not open is a HostError with the name of the target."""
    real = os.open

    def refusing(path: str, flags: int, *arguments: int, **named: int) -> int:
        if str(path).endswith(".part") and not flags & os.O_CREAT:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return real(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", refusing)
    (tmp_path / "a.raw").write_bytes(b"x" * 5000)
    new = tmp_path / "new.qed"
    with pytest.raises(HostError, match=rf"^{new}: cannot open: Too many open files$"):
        trio.run(convert, str(tmp_path / "a.raw"), str(new))
    assert names(tmp_path) == {"a.raw"}


def test_a_standard_stream_that_cannot_be_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standard stream that the host does not duplicate is one line that names the stream."""
    real = os.dup

    def refuse(fd: int) -> int:
        if fd != 1:
            return real(fd)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "dup", refuse)
    (tmp_path / "a.raw").write_bytes(b"x" * 5000)
    assert main(["convert", "-O", "raw", str(tmp_path / "a.raw"), "-"]) == 1
    said = capsys.readouterr().err
    assert said == "qedimg: standard output: cannot open: Too many open files\n"


def test_an_option_that_qemu_img_refuses_fails_before_the_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that qemu-img refuses is an error before any data is copied."""
    (tmp_path / "a.raw").write_bytes(b"x" * 5000)
    copies: list[object] = []

    async def run(copy: object, _streams: int) -> None:
        copies.append(copy)

    monkeypatch.setattr(diskcopy.DiskCopy, "run", run)
    source, new = str(tmp_path / "a.raw"), str(tmp_path / "x")
    assert main(["convert", "-O", "qcow2", "-o", "nonsense=1", source, new]) == 1
    assert "Invalid parameter" in capsys.readouterr().err
    assert not copies
    assert main(["convert", "-O", "qcow2", source, new]) == 0
    assert copies


@pytest.mark.parametrize("formats", ["Supported formats: qcow2 raw", "no list at all"])
def test_the_text_of_qemu_img_does_not_matter(
    formats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status and files of qemu-img count, whatever its versions print."""
    real = shutil.which("qemu-img")
    wrapper = tmp_path / "bin" / "qemu-img"
    wrapper.parent.mkdir()
    wrapper.write_text(
        "#!/bin/sh\n"
        f'case " $* " in *" --help "*) echo "{formats}"; exit 0;; esac\n'
        f'{real} "$@" >/dev/null || {{ echo "something new" >&2; exit 1; }}\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    source = chains.draw_image(tmp_path / "a.qed", random.Random(3))
    new = tmp_path / "new.qcow2"
    assert main(["convert", "-O", "qcow2", str(source), str(new)]) == 0
    assert main(["convert", "-O", "bogus", str(source), str(tmp_path / "x")]) == 1
    monkeypatch.undo()
    assert qemu.compare(source, new, second_format="qcow2")


@pytest.mark.parametrize("way", ["over-base", "into-existing", "into-existing-over-base"])
@pytest.mark.parametrize("is_hole", [False, True])
def test_the_last_sector_of_a_raw_file_ends_with_zeros(
    way: str, tmp_path: Path, *, is_hole: bool
) -> None:
    """Zeros follow a raw file that ends within a sector, whatever the target held there."""
    length = (1 << 16) + 1000
    base = tmp_path / "base.raw"
    base.write_bytes(b"B" * (1 << 20))
    source = tmp_path / "odd.raw"
    source.write_bytes(b"B" * (65536 if is_hole else length))
    os.truncate(source, length)
    ours, theirs = tmp_path / "ours.qed", tmp_path / "theirs.qed"
    over = [] if way == "into-existing" else ["-B", str(base), "-F", "raw"]
    if way == "over-base":
        words = over
    else:
        for path in (ours, theirs):
            qemu.create(path, 67072, backing=base if over else None, backing_format="raw")
            qemu.io(path, "write -P 66 0 67072")
        words = ["-n"]
    assert main(["convert", "--compare", *words, str(source), str(ours)]) == 0
    qemu.run("qemu-img", "convert", "-f", "raw", "-O", "qed", *words, source, theirs)
    assert qemu.compare(ours, theirs, second_format="qed")
    zeros = ours.with_suffix(".raw")
    qemu.run("qemu-img", "convert", "-f", "qed", "-O", "raw", ours, zeros)
    assert zeros.read_bytes()[length:66560] == bytes(66560 - length)
    assert zeros.read_bytes()[:length] == source.read_bytes()


def test_the_measured_length_counts_the_zeros_after_a_raw_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last cluster of a raw file that ends within a sector needs space if the zeros differ."""
    base, source = tmp_path / "base.raw", tmp_path / "odd.raw"
    base.write_bytes(b"B" * 1024)
    source.write_bytes(b"B" * 1000)
    over = ["-B", str(base), "-F", "raw"]
    assert main(["measure", *over, "--output", "json", str(source)]) == 0
    measured = json.loads(capsys.readouterr().out)["required"]
    copy = tmp_path / "copy.qed"
    assert main(["convert", *over, str(source), str(copy)]) == 0
    assert measured == copy.stat().st_size
    assert qemu.compare(copy, source, second_format="raw")


MISTAKES: Final = {
    "exists": ("a.raw b.raw", "b.raw: exists already (--force"),
    "itself": ("--force a.raw a.raw", "a.raw: target: found the source itself"),
    "linked": ("--force a.raw link", "link: target: found the source itself"),
    "base": ("--force top.qed base.qed", "base.qed: target: found a base of the source"),
    "into-base": ("-n top.qed base.qed", "base.qed: target: found a base of the source"),
    "no-directory": ("a.raw gone/x", "gone/x: cannot create: found no directory gone"),
    "no-source": ("gone x", "gone: cannot open: No such file"),
    "directory": (". x", "found a directory"),
    "into-directory": ("--force a.raw .", "found a directory, expected a new file"),
    "format": ("-O bogus a.raw x", "x: format: found bogus, expected one that qemu-img makes (Un"),
    "read-only-format": ("-O bochs a.raw x", "x: format: found bochs, expected one that qemu-img"),
    "source-format": ("-f qcow2 a.raw x", "-f: found qcow2, expected raw or qed (without -f"),
    "foreign": ("foreign x", "foreign: qemu-nbd: Unsupported qcow2 version 0\n"),
    "not-qed": ("-f qed a.raw x", "a.raw: not a QED image"),
    "compress": ("-c a.raw x", "-c: QED has no compression"),
    "streams": ("-m 17 a.raw x", "-m: found 17, expected 1 to 16"),
    "cluster": ("--cluster-size 5000 a.raw x", "cluster size: found 5000"),
    "geometry": ("-O raw --cluster-size 4k a.raw x", "qedimg: --cluster-size: found -O raw"),
    "geometry-0": ("-O raw --cluster-size 0 a.raw x", "qedimg: --cluster-size: found -O raw"),
    "geometries": (
        "-O raw -o table_size=2 --table-size 2 a.raw x",
        "qedimg: --table-size, -o: found -O raw, expected -O qed",
    ),
    "foreign-geometry": (
        "-O qcow2 -o lazy_refcounts=on --table-size 2 a.raw x",
        "qedimg: --table-size: found -O qcow2, expected -O qed (options of another format are",
    ),
    "geometry-of-old": (
        "-n --cluster-size 4k -o table_size=2 a.raw base.qed",
        "qedimg: --cluster-size, -o: found -n, expected a new image",
    ),
    "too-large": ("--cluster-size 4k --table-size 2 huge.raw x", "image size: found 5368709120"),
    "key": ("-o compat=1 a.raw x", "option -o: found compat=1"),
    "raw-overlay": (
        "-O raw -B base.qed a.raw x",
        "x: found format raw with a backing file, expected qed",
    ),
    "foreign-overlay": (
        "-O qcow2 -B base.qed a.raw x",
        "x: found format qcow2 with a backing file, expected qed",
    ),
    "foreign-base": (
        "-O qcow2 -o backing_file=base.qed a.raw x",
        "found format qcow2 with a backing file, expected",
    ),
    "no-value": ("-o backing_file= a.raw x", "option backing_file: found no value"),
    "two-bases": ("-B base.qed -o backing_file=gone a.raw x", "backing_file: found two values"),
    "small": ("-n huge.raw base.qed", "base.qed: size: found 1048576, expected at least"),
    "raw-over-qed": ("-n -O raw a.raw base.qed", "base.qed: found a QED image, expected raw"),
    "raw-over-foreign": (
        "-n -O raw a.raw foreign",
        "foreign: format: found qcow2, expected raw content (qemu-img convert -n can write into",
    ),
    "base-of-old": ("-n -B base.qed a.raw top.qed", "top.qed: found an existing target, which"),
    "overlay-pipe": (
        "-O raw -B base.qed a.raw -",
        "-: found a pipe, which can only be written with -O raw and without a backing file",
    ),
    "compared-pipe": ("-O raw --compare a.raw -", "without a backing file or --compare"),
    "image-pipe": ("top.qed -", "-: found a pipe, which can only be written with -O raw"),
    "foreign-option": ("-O qcow2 -o nonsense=1 a.raw x", "x: qemu-img: Invalid parameter 'non"),
    "foreign-help": ("-O qcow2 -o help a.raw x", "x: -o help: found no file made by qemu-img,"),
    "foreign-extents": (
        "-O vmdk -o subformat=twoGbMaxExtentFlat,adapter_type=ide a.raw x",
        "x: -o subformat=twoGbMaxExtentFlat,adapter_type=ide: found 2 files made by qemu-img",
    ),
    "data-file": (
        "-O qcow2 -o compat=1.1 -o lazy_refcounts=on,data_file=b.raw a.raw x",
        "x: -o compat=1.1 lazy_refcounts=on,data_file=b.raw: found a file of its own for the data,",
    ),
    "data-file-on": (
        "-O qcow2 -o data_file a.raw x",
        "x: -o data_file: found a file of its own for the data, expected one file",
    ),
    "data-file-off": ("-O qcow2 -o nodata_file,compat=1.1 a.raw x", "found a file of its own for"),
}
IN_BASE: Final = {
    "missing": ("-B gone a.raw x", "x: backing file gone: cannot open"),
    "foreign": ("-B foreign a.raw x", "x: backing file foreign: qemu-nbd: Unsupported qcow2"),
    "other-foreign": ("-B foreign -F vdi a.raw x", "found a qcow2 image, expected the format vdi"),
    "qed-as-foreign": ("-B base.qed -F vdi a.raw x", "found a QED image, expected the format vdi"),
    "foreign-as-qed": ("-B foreign -F qed a.raw x", "found qcow2, expected a QED image\n"),
    "no-format": ("-B b.raw a.raw x", "b.raw: found no QED magic, expected a QED image, or -F raw"),
}


def test_the_base_as_an_option_of_the_format(tmp_path: Path) -> None:
    """-o backing_file and backing_fmt mean -B and -F, as in qemu-img."""
    base = qemu.create(tmp_path / "base.qed", 1 << 20)
    qemu.io(base, "write -P 1 0 512k")
    source = qemu.create(tmp_path / "source.qed", 1 << 20, backing="base.qed")
    qemu.io(source, "write -P 2 64k 64k")
    option = "backing_file=base.qed,backing_fmt=qed"
    theirs = tmp_path / "theirs.qed"
    qemu.run("qemu-img", "convert", "-O", "qed", "-o", option, source, theirs)
    for more in ([], ["-B", "base.qed", "-F", "qed"]):
        new = tmp_path / f"new{len(more)}.qed"
        assert main(["convert", "-q", *more, "-o", option, str(source), str(new)]) == 0
        for key in ("backing-filename", "full-backing-filename", "virtual-size"):
            ours, expected = qemu.info(new)[key], qemu.info(theirs)[key]
            assert str(ours).replace(new.name, "") == str(expected).replace(theirs.name, "")
        assert qemu.content(new) == qemu.content(theirs) == qemu.content(source)
        assert new.stat().st_blocks <= theirs.stat().st_blocks


@pytest.mark.parametrize("row", [*MISTAKES, *(f"base {name}" for name in IN_BASE)])
def test_mistakes_get_one_line_and_leave_nothing(
    row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each mistake is one line, and no file is created or changed."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.raw", "b.raw"):
        (tmp_path / name).write_bytes(b"x" * 5000)
    (tmp_path / "link").symlink_to("a.raw")
    (tmp_path / "foreign").write_bytes(b"QFI\xfb" + bytes(5000))
    with (tmp_path / "huge.raw").open("wb") as file:
        file.truncate(5 << 30)
    qemu.create(tmp_path / "base.qed", 1 << 20)
    qemu.create(tmp_path / "top.qed", 1 << 20, backing="base.qed")
    before = {name: (tmp_path / name).stat() for name in names(tmp_path)}
    base = row.startswith("base ")
    words, expected = IN_BASE[row.removeprefix("base ")] if base else MISTAKES[row]
    assert main(["convert", *words.split()]) in {1, 12, 17, 25}
    said = capsys.readouterr()
    assert said.out == ""
    assert expected in said.err
    assert said.err.startswith("qedimg: ")
    assert said.err.count("\n") == 1
    after = {name: (tmp_path / name).stat() for name in names(tmp_path)}
    assert after.keys() == before.keys()
    for name, info in after.items():
        assert (info.st_ino, info.st_mtime_ns) == (before[name].st_ino, before[name].st_mtime_ns)


def test_without_qemu_img(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without qemu-img a foreign format is refused with a line that says so."""
    (tmp_path / "a.raw").write_bytes(b"x" * 5000)
    monkeypatch.setenv("PATH", str(tmp_path))
    target = tmp_path / "x.qcow2"
    assert main(["convert", "-O", "qcow2", str(tmp_path / "a.raw"), str(target)]) == 1
    assert "format qcow2: expected qemu-img to be installed\n" in capsys.readouterr().err
    assert names(tmp_path) == {"a.raw"}


def test_a_qemu_img_that_cannot_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A qemu-img that the host cannot execute is one line that says so."""
    (tmp_path / "a.raw").write_bytes(b"x" * 5000)
    program = tmp_path / "qemu-img"
    program.write_bytes(b"no program")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    target = tmp_path / "x.qcow2"
    assert main(["convert", "-O", "qcow2", str(tmp_path / "a.raw"), str(target)]) == 1
    assert capsys.readouterr().err == f"qedimg: {program}: cannot run: Exec format error\n"
    assert names(tmp_path) == {"a.raw", "qemu-img"}


@pytest.mark.parametrize("step", ["create", "convert"])
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("kill -9 $$", "ended by SIGKILL"),
        ("echo lost >&2; kill -35 $$", "ended by signal 35"),
        ("exit 3", "ended with status 3"),
        ("echo 'qemu-img: warning: x' >&2; exit 3", "ended with status 3"),
        ("printf '\\n\\nqemu-img: no room\\n' >&2; exit 1", "no room"),
    ],
)
def test_a_qemu_img_that_gives_no_reason(
    step: str,
    script: str,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The line about a qemu-img that fails has a reason, also if qemu-img has printed none."""
    real = shutil.which("qemu-img")
    wrapper = tmp_path / "bin" / "qemu-img"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/sh\ncase " $* " in *" -o help "*) ;; " {step} "*) {script};; esac\n'
        f'exec {real} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    (tmp_path / "a.raw").write_bytes(b"x" * 5000)
    target = tmp_path / "x.qcow2"
    assert main(["convert", "-O", "qcow2", str(tmp_path / "a.raw"), str(target)]) == 1
    assert capsys.readouterr().err == f"qedimg: {target}: qemu-img: {expected}\n"
    assert names(tmp_path) == {"a.raw", "bin"}


def test_compare_detects_a_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --compare a copy that differs is an error and never gets its name."""
    (tmp_path / "a.raw").write_bytes(b"x" * (1 << 20))

    def spoil(name: str) -> None:
        with (tmp_path / name).open("r+b") as file:
            file.seek(777_777)
            file.write(b"y")

    async def spoilt(source: object, copy: object, name: str) -> None:
        spoil(next(name for name in names(tmp_path) if name.startswith(".new")))
        await verify_copy(source, copy, name)  # type: ignore[arg-type]

    monkeypatch.setattr(conversion, "verify_copy", spoilt)
    words = ["--compare", "-O", "raw", str(tmp_path / "a.raw"), str(tmp_path / "new.raw")]
    assert main(["convert", *words]) == 1
    assert "new.raw: content at 777777: found other bytes" in capsys.readouterr().err
    assert names(tmp_path) == {"a.raw"}


@pytest.mark.parametrize(
    "policy",
    [
        ["--backing", "none"],
        ["--backing-format", "raw"],
        ["--backing-format", "qed"],
        ["--backing-format", "qcow2"],
    ],
)
def test_the_comparison_opens_the_named_base(policy: list[str], tmp_path: Path) -> None:
    """The policy is for the bases that the source names, and the copy is over the named base."""
    for name in ("below.raw", "below.qed", "below.qcow2"):
        form = name.rpartition(".")[2]
        qemu.create(tmp_path / name, 1 << 20, image_format=form)
        qemu.io(tmp_path / name, "write -P 1 64k 64k", image_format=form)
    source, base = tmp_path / "source.qed", tmp_path / "base.qed"
    form = "" if policy[1] == "none" else policy[1]
    below = {"backing": tmp_path / f"below.{form}", "backing_format": form} if form else {}
    for path, value in ((source, 2), (base, 3)):
        qemu.create(path, 1 << 20, **below)  # type: ignore[arg-type]
        qemu.io(path, f"write -P {value} 256k 64k")
    new = tmp_path / "new.qed"
    words = [*policy, "-B", str(base), "--compare", str(source), str(new)]
    assert main(["convert", *words]) == 0
    assert qemu.info(new)["backing-filename"] == str(base)
    assert qemu.compare(source, new, second_format="qed")


def test_an_error_of_the_comparison_names_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the copy cannot be read back, the message has no name of a temporary file."""
    (tmp_path / "a.raw").write_bytes(b"x" * (1 << 20))
    new = tmp_path / "new.qed"

    async def spoilt(_source: object, copy: Source, _name: str) -> None:
        assert copy.name.endswith(".part")
        msg = f"{copy.name}: cannot read"
        raise HostError(msg)

    monkeypatch.setattr(conversion, "verify_copy", spoilt)
    assert main(["convert", "--compare", str(tmp_path / "a.raw"), str(new)]) == 1
    assert capsys.readouterr().err == f"qedimg: {new}: cannot read\n"
    assert names(tmp_path) == {"a.raw"}


def test_a_bad_entry_ends_the_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad entry ends the conversion instead of being copied as zeros."""
    image = qemu.create(tmp_path / "a.qed", 1 << 20)
    qemu.io(image, "write -P 1 0 64k")
    content = bytearray(image.read_bytes())
    put_entry(content, l2_entry_offset(content, 0), 1 << 40)
    image.write_bytes(content)
    assert main(["convert", str(image), str(tmp_path / "new.qed")]) == 13
    assert "L2 entry 0: found 1099511627776" in capsys.readouterr().err
    assert names(tmp_path) == {"a.qed"}


@pytest.mark.expect_log("the copy ended early")
@pytest.mark.parametrize("form", ["qed", "raw"])
def test_a_failed_copy_into_an_existing_disk_is_reported(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """If the source cannot be read to its end, a line says that the target may be mixed."""
    image = qemu.create(tmp_path / "a.qed", 16 << 20)
    qemu.io(image, "write -P 1 0 16M")
    target = qemu.create(tmp_path / "target", 16 << 20, image_format=form)
    words = ["convert", "-n", "-O", form, str(image), str(target)]
    assert main(words) == 0
    assert not caplog.messages
    content = bytearray(image.read_bytes())
    put_entry(content, l2_entry_offset(content, 255), 1 << 40)
    image.write_bytes(content)
    assert main(words) == 13
    partial = f"{target}: the copy ended early: old and new content may be mixed"
    assert caplog.messages == [partial]
    # A target that is refused has not been written to.
    os.truncate(image, 65536)
    assert main([*words[:-1], str(tmp_path / "missing")]) > 0
    assert caplog.messages == [partial]


def test_large_clusters_and_disks_take_little_memory(tmp_path: Path) -> None:
    """Neither clusters of 64 MiB nor a sparse disk of 64 TiB take more than 256 MiB of memory."""
    raw = tmp_path / "a.raw"
    with raw.open("wb") as file:
        for at in (0, 1 << 30, (1 << 34) - 5):
            file.seek(at)
            file.write(b"data!")
    huge = qemu.create(tmp_path / "huge.qed", 1 << 46)
    qemu.io(huge, f"write -P 3 {1 << 45} 64k")
    image = tmp_path / "wide.qed"
    wide = ["--compare", "--cluster-size", "64M", "--table-size", "16", str(raw), str(image)]
    for words in (wide, [str(huge), str(tmp_path / "copy.qed")]):
        _said, peak, _modules = memory.run("convert", *words)
        assert peak < 256 * memory.MIB
    # QEMU opens no image with such clusters.
    assert main(["check", str(image)]) == 0
    assert (tmp_path / "copy.qed").stat().st_size == huge.stat().st_size


@pytest.mark.parametrize("words", [[], ["-t", "writeback"], ["-t", "unsafe"]])
def test_the_new_file_is_durable(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is synced before it gets its name, then its directory; with unsafe nothing is."""
    (tmp_path / "a.raw").write_bytes(b"x" * (1 << 20))
    synced = []
    real = os.fsync

    def watched(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115  a name
        real(fd)

    monkeypatch.setattr(os, "fsync", watched)
    assert main(["convert", *words, str(tmp_path / "a.raw"), str(tmp_path / "new.qed")]) == 0
    assert chains.content(tmp_path / "new.qed") == b"x" * (1 << 20)
    if "unsafe" in words:
        assert not synced
    else:
        first, second = synced
        assert first.startswith(f"{tmp_path}/.new.qed.")
        assert second == str(tmp_path)


def test_the_copy_of_an_overlay_loads_no_masked_arrays(tmp_path: Path) -> None:
    """Some functions of numpy import numpy.ma, which takes longer than the copy of a small disk."""
    qemu.io(qemu.create(tmp_path / "base.qed", 1 << 20), "write -P 1 64k 64k")
    qemu.io(qemu.create(tmp_path / "top.qed", backing="base.qed"), "write -P 2 0 64k")
    script = """
import sys
from qedfuse.cli.qedimg.main import main
print(main(["convert", "-q", "-O", "raw", "top.qed", "new.raw"]), *sys.modules)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    code, *modules = done.stdout.split()
    assert code == "0"
    assert "qedfuse.tools.source.chainruns" in modules
    assert "numpy.ma" not in modules
