"""Images that name files elsewhere, or that lie, are refused, and nothing elsewhere is read."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from qedfuse.foreign import graph
from qedfuse.foreign.sandbox import launch_command
from qedfuse.hostio.posixfile import PosixFile
from qedfuse.util.landlock import landlock_version
from tests.support import qemu
from tests.support.foreignchains import processes
from tests.support.programs import qedimg

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qedfuse.foreign.graph import Limits

SECRET: Final = b"secret of another directory " * 2048
OLD: Final = 1_000_000_000
"""A time of the last access that any read would replace."""

needs_landlock = pytest.mark.skipif(not landlock_version(), reason="no Landlock in the kernel")


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    """Give a file elsewhere, which nothing may have read at the end of the test."""
    path = tmp_path / "elsewhere" / "secret.raw"
    path.parent.mkdir()
    path.write_bytes(SECRET)
    os.utime(path, (OLD, OLD))
    yield path
    assert path.stat().st_atime == OLD


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Give the directory of the image."""
    path = tmp_path / "images"
    path.mkdir()
    return path


_BACKING_FORMAT: Final = 0xE2792ACA
"""The type of the extension in a qcow2 header that names the format of the backing file."""


def refused(path: Path, code: int, *options: str) -> str:
    """Run commands that must refuse an image; return the line of the last one."""
    lines = []
    for words in (["info"], ["convert", "-O", "raw"]):
        target = [str(path.parent / "copy.raw")] if words[0] == "convert" else []
        found, output, complaint = qedimg(*words, *options, str(path), *target)
        assert (found, output) == (code, ""), (words, output, complaint)
        assert complaint.count("\n") == 1
        assert not (path.parent / "copy.raw").exists()
        lines.append(complaint.removeprefix("qedimg: ").rstrip())
    assert len(set(lines)) == 1, lines
    assert processes(path.parent) == []
    return lines[0]


def test_accessed_times_show_reads(secret: Path) -> None:
    """The tests below would see a read of the secret by its time of access."""
    secret.read_bytes()
    assert secret.stat().st_atime > OLD
    os.utime(secret, (OLD, OLD))


@pytest.mark.parametrize("image_format", ["qcow2", "qcow"])
def test_backing_file_elsewhere(images: Path, secret: Path, image_format: str) -> None:
    """A backing file outside the directory of the image is refused, whatever its name is like."""
    for name in (str(secret), "../elsewhere/secret.raw", "link"):
        path = images / f"evil.{image_format}"
        (images / "link").unlink(missing_ok=True)
        (images / "link").symlink_to(secret)
        qemu.create(path, image_format=image_format, backing=secret, backing_format="raw")
        found = bytearray(path.read_bytes())
        at = struct.unpack_from(">Q", found, 8)[0]
        found[at : at + len(name)] = name.encode()
        struct.pack_into(">I", found, 16, len(name))
        path.write_bytes(found)
        line = refused(path, 17)
        assert "refused: found" in line
        assert str(secret) in line


def test_allowed_elsewhere(images: Path, secret: Path) -> None:
    """The directory of such a backing file can be allowed."""
    path = qemu.create(
        images / "good.qcow2", 65536, image_format="qcow2", backing=secret, backing_format="raw"
    )
    copy = images / "copy.raw"
    for option in (("--backing-dir", str(secret.parent)), ("--backing", "any")):
        done = qedimg("convert", *option, "-O", "raw", str(path), str(copy))
        assert done == (0, "", "")
        assert copy.read_bytes()[: len(SECRET)] == SECRET[:65536]
        copy.unlink()
    os.utime(secret, (OLD, OLD))


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"file","filename":"%s"}',
        'json:{"driver":"raw","file":{"driver":"file","filename":"%s"}}',
        "nbd:unix:%s",
        "nbd://127.0.0.1:1/x",
        "https://127.0.0.1:1/x.qcow2",
        "blkdebug::%s",
        "fat:%s",
        "host_device:%s",
    ],
)
def test_protocols(images: Path, secret: Path, name: str) -> None:
    """A name for another driver of QEMU than that of files is refused."""
    path = images / "evil.qcow2"
    full = (name % secret) if "%s" in name else name
    write_qcow2(path, backing=full.encode())
    assert "refused" in (line := refused(path, 17)) or "found a protocol" in line


def test_data_file_elsewhere(images: Path, secret: Path) -> None:
    """A file with the data of the image that is elsewhere is refused."""
    path = images / "evil.qcow2"
    made = images / "data.raw"
    options = f"data_file={made},data_file_raw=on"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "64k")
    found = path.read_bytes()
    name = str(secret).encode()
    path.write_bytes(put_extension(found, 0x44415441, name))
    assert "refused: found" in refused(path, 17)


def test_data_file(images: Path) -> None:
    """A file with the data of the image that is beside the image is read."""
    path = images / "good.qcow2"
    options = f"data_file={images / 'data.raw'}"
    qemu.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "1M")
    qemu.io(path, "write -P 9 0 64k", image_format="qcow2")
    copy = images / "copy.raw"
    assert qedimg("convert", "-O", "raw", str(path), str(copy)) == (0, "", "")
    assert copy.read_bytes() == b"\x09" * 65536 + bytes((1 << 20) - 65536)


DESCRIPTOR: Final = """\
# Disk DescriptorFile
version=1
CID=12345678
parentCID=%s
createType="monolithicFlat"
%s
# Extent description
RW %d FLAT "%s" 0
"""


def test_vmdk_extent_elsewhere(images: Path, secret: Path) -> None:
    """A list of extents that names one elsewhere, or of another driver, is refused."""
    path = images / "evil.vmdk"
    for name in (str(secret), "../elsewhere/secret.raw", f"json:{{'filename':'{secret}'}}"):
        path.write_text(DESCRIPTOR % ("ffffffff", "", len(SECRET) // 512, name), "utf-8")
        refused(path, 17)
    path.write_text(DESCRIPTOR % ("ffffffff", "", 8, "nbd:unix:/run/x"), "utf-8")
    assert "found a protocol" in refused(path, 17)


@pytest.mark.parametrize(
    "line",
    [
        'RW +2 FLAT "%s" 0',
        'RW 2FLAT "%s" 0',
        'RW 0x2 FLAT "%s" 0',
        'RW 2 FLAT"%s" 0',
        'RW 2 FLAT "%s" +0',
        'RW 2 FLAT "%s"',
        'RW 2 FLAT "%s" 0 more',
        'RW\n2 FLAT "%s" 0',
        'RW 2 ZERO\n"%s" 0',
        '\vRW 2 FLAT "%s" 0',
        '\rRW 2 FLAT "%s" 0',
        'RW\f2 FLAT "%s" 0',
        'RDONLY 2 FLAT "%s" 0',
        'NOACCESS 2 FLAT "%s" 0',
        "RW 2 ZERO",
        'RW 2 flat "%s" 0',
        'version=1\0\nRW 2 FLAT "%s" 0',
        '# comment\vRW\nRW 2 FLAT "%s" 0',
        '"%s"',
        "2 FLAT",
    ],
)
def test_vmdk_line_of_another_form(images: Path, secret: Path, line: str) -> None:
    """A descriptor with a line that QEMU could read differently is refused, and names the line."""
    path = images / "evil.vmdk"
    (images / "good.raw").write_bytes(bytes(4096))
    text = DESCRIPTOR % ("ffffffff", "", 8, "good.raw")
    path.write_text(text + line.replace("%s", str(secret)) + "\n", "utf-8")
    assert "of the descriptor: found '" in refused(path, 25)


def test_vmdk_without_extents(images: Path) -> None:
    """A descriptor without extents is refused."""
    path = images / "empty.vmdk"
    path.write_text(DESCRIPTOR.partition("RW")[0] % ("ffffffff", ""), "utf-8")
    assert "without extents" in refused(path, 25)


def test_vmdk_stated_over_other_bytes(images: Path, secret: Path) -> None:
    """A backing file that is stated to be VMDK, and begins with no VMDK header, is refused."""
    text = (DESCRIPTOR % ("ffffffff", "", 8, secret)).partition("\n")[2]
    (images / "base").write_text(text.replace("version=1", 'createType="monolithicFlat"'), "utf-8")
    path = images / "evil.qcow2"
    write_qcow2(path, backing=b"base")
    start = path.read_bytes()
    path.write_bytes(put_extension(start, 0xE2792ACA, b"vmdk"))
    assert "found 'crea' at the start of a VMDK image" in refused(path, 25)


def test_vmdk_parent_without_name(images: Path) -> None:
    """An image that has a parent by its identifier, but not by its name, is refused."""
    base = qemu.create(images / "base.vmdk", 1 << 20, image_format="vmdk")
    path = qemu.create(
        images / "top.vmdk", image_format="vmdk", backing=base, backing_format="vmdk"
    )
    found = path.read_bytes()
    assert found.count(b'parentFileNameHint="') == 1
    path.write_bytes(found.replace(b'parentFileNameHint="', b'parentFileNameHint ="'))
    assert "and no parentFileNameHint=" in refused(path, 25)


@needs_landlock
@pytest.mark.parametrize("is_list", [False, True], ids=["image", "list"])
def test_vmdk_parent_of_any_length(
    images: Path, monkeypatch: pytest.MonkeyPatch, *, is_list: bool
) -> None:
    """A parent's name of up to 4095 bytes is followed, as in QEMU; a longer one is not cut off."""
    monkeypatch.chdir(images)  # short paths, because the host's limit is 4095 bytes
    qemu.create("base.vmdk", 1 << 20, image_format="vmdk")
    qemu.io("base.vmdk", "write -P 9 64k 64k", image_format="vmdk")
    options = ["-o", "subformat=twoGbMaxExtentSparse"] if is_list else []
    command = ["qemu-img", "create", "-q", "-f", "vmdk", *options, "-F", "vmdk", "-b"]
    qemu.run(*command, "base.vmdk", "top.vmdk")
    path = Path("top.vmdk")
    image = path.read_bytes()
    start = image.index(b"# Disk DescriptorFile")
    text = image[start:].partition(b"\0")[0]
    assert (start == 0) == is_list
    for length in (1023, 1024, 4000, 4095, 4096, 5000):
        name = b"./" * ((length - 9) // 2) + b"/" * ((length - 9) % 2) + b"base.vmdk"
        assert len(name) == length
        changed = text.replace(b'"base.vmdk"', b'"%s"' % name)
        assert len(changed) == len(text) + length - 9
        path.write_bytes(image[:start] + changed + image[start + len(changed) :])
        if length > 4095:
            assert refused(path, 25) == (
                f"top.vmdk: parentFileNameHint: found a name of {length} bytes, expected at most "
                "4095"
            )
            with pytest.raises(qemu.QemuError, match="Invalid argument"):
                qemu.info(path)
            continue
        assert qemu.info(path)["backing-filename"] == name.decode()
        copy = Path("copy.raw")
        assert qedimg("convert", "-O", "raw", str(path), str(copy)) == (0, "", "")
        assert copy.read_bytes()[65536:131072] == b"\x09" * 65536
        copy.unlink()


def test_vmdk_parent_whose_name_has_no_end(images: Path) -> None:
    """A name to which the descriptor has no closing quotation mark is refused, as in QEMU."""
    path = qemu.create(images / "top.vmdk", 1 << 20, image_format="vmdk")
    found = path.read_bytes()
    start = found.index(b"# Disk DescriptorFile")
    end = found.index(b"\0", start)
    text = b'parentFileNameHint="base.vmdk\n'
    path.write_bytes(found[:end] + text + found[end + len(text) :])
    assert "found a name without a quotation mark after it" in refused(path, 25)
    with pytest.raises(qemu.QemuError, match="Invalid argument"):
        qemu.info(path)


@needs_landlock
def test_vmdk_with_one_extent_twice(images: Path) -> None:
    """An extent may be named twice, also by two names, as QEMU permits it; the image may not."""
    content = os.urandom(65536)
    (images / "x.raw").write_bytes(content)
    (images / "link.raw").symlink_to("x.raw")
    path = images / "twice.vmdk"
    names = ("x.raw", "x.raw", "./x.raw", "link.raw")
    text = DESCRIPTOR.partition("RW")[0] % ("ffffffff", "")
    path.write_text(text + "".join(f'RW 128 FLAT "{name}" 0\n' for name in names), "utf-8")
    assert qemu.content(path, image_format="vmdk") == content * len(names)
    copy = images / "copy.raw"
    assert qedimg("convert", "-O", "raw", str(path), str(copy)) == (0, "", "")
    assert copy.read_bytes() == content * len(names)
    copy.unlink()
    path.write_text(text + 'RW 1 FLAT "./twice.vmdk" 0\n', "utf-8")
    assert "found a loop in the chain" in refused(path, 17)


@needs_landlock
def test_vmdk_with_many_extents(images: Path) -> None:
    """A list of many extents is read, of which QEMU opens each, and a list of too many refused."""
    path = images / "split.vmdk"
    lines = []
    for number in range(513):
        (images / f"x-f{number:03}.raw").write_bytes(number.to_bytes(2, "big") * 256)
        lines.append(f'RW 1 FLAT "x-f{number:03}.raw" 0\n')
    head = DESCRIPTOR.partition("RW")[0] % ("ffffffff", "")
    path.write_text(head + "".join(lines[:200]), "utf-8")
    copy = images / "copy.raw"
    assert qedimg("convert", "-O", "raw", str(path), str(copy)) == (0, "", "")
    assert copy.read_bytes() == b"".join(n.to_bytes(2, "big") * 256 for n in range(200))
    copy.unlink()
    path.write_text(head + "".join(lines), "utf-8")
    assert "more than 512 extents" in refused(path, 25)


def test_vmdk_extent_after_empty_line(images: Path) -> None:
    """An extent after an empty line, which QEMU puts into the disk twice, is refused."""
    path = images / "list.vmdk"
    (images / "x.raw").write_bytes(bytes(4096))
    text = DESCRIPTOR % ("ffffffff", "", 8, "x.raw")
    for empty in ("\n", " \t\r\n"):
        path.write_text(text.replace("# Extent description\n", empty), "utf-8", newline="")
        assert "QEMU would read the extent twice" in refused(path, 25)


@needs_landlock
def test_vmdk_extents(images: Path) -> None:
    """A list of extents beside it is read."""
    path = images / "good.vmdk"
    options = "subformat=twoGbMaxExtentFlat"
    qemu.run("qemu-img", "create", "-q", "-f", "vmdk", "-o", options, path, "1M")
    qemu.io(path, "write -P 9 0 64k", image_format="vmdk")
    assert b"DescriptorFile" in path.read_bytes()
    copy = images / "copy.raw"
    assert qedimg("convert", "-O", "raw", str(path), str(copy)) == (0, "", "")
    assert copy.read_bytes() == b"\x09" * 65536 + bytes((1 << 20) - 65536)


def test_vmdk_parent_elsewhere(images: Path, secret: Path) -> None:
    """A parent elsewhere is refused, also in a descriptor that is a part of an image."""
    path = qemu.create(images / "evil.vmdk", 1 << 20, image_format="vmdk")
    found = bytearray(path.read_bytes())
    text = f'parentFileNameHint="{secret}"\n'.encode()
    at = found.index(b"# Extent description")
    found[at : at + len(text)] = text
    path.write_bytes(found)
    assert "refused: found" in refused(path, 17)


def test_vmdk_with_hidden_list(images: Path, secret: Path) -> None:
    """An image without a size of its own, which QEMU takes for a list of extents, is refused."""
    path = images / "evil.vmdk"
    start = bytearray(qemu.create(path, 1 << 20, image_format="vmdk").read_bytes()[: 1 << 16])
    text = (DESCRIPTOR % ("ffffffff", "", 8, secret)).encode()
    start[512 : 512 + len(text)] = text
    start[12:20] = bytes(8)
    path.write_bytes(start)
    assert "capacity" in refused(path, 25)
    good = images / "list.vmdk"
    good.write_text(DESCRIPTOR % ("ffffffff", "", 2048, "evil.vmdk"), "utf-8")
    good.write_text(good.read_text("utf-8").replace("FLAT", "SPARSE").replace(" 0\n", "\n"))
    assert "capacity" in refused(good, 25)


def test_vhd_with_a_parent(images: Path) -> None:
    """A differencing VHD image, whose parent QEMU would ignore, is refused."""
    path = images / "evil.vhd"
    found = bytearray(qemu.create(path, 1 << 20, image_format="vpc").read_bytes())
    assert found.startswith(b"conectix")
    struct.pack_into(">I", found, 60, 4)
    path.write_bytes(found)
    expected = f"{path}: found a differencing VHD image, expected one without a parent"
    assert refused(path, 25) == expected


def test_base_of_an_unknown_format(images: Path) -> None:
    """A base whose format the header names, and which is none of the known ones, is refused."""
    path = images / "top.qcow2"
    (images / "other").write_bytes(bytes(65536))
    write_qcow2(path, backing=b"other")
    path.write_bytes(put_extension(path.read_bytes(), _BACKING_FORMAT, b"bochs"))
    expected = f"{path}: backing file {images / 'other'}: found format bochs, expected raw, qed, "
    assert refused(path, 17).startswith(expected)


def test_without_landlock(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel without Landlock an image that names another file is refused."""
    monkeypatch.setattr(graph, "landlock_version", lambda: 0)
    (images / "base.raw").write_bytes(bytes(65536))
    path = images / "image.qcow2"
    write_qcow2(path, backing=b"base.raw")
    with pytest.raises(Exception, match="no Landlock"):
        open_graph(path)
    (images / "list.vmdk").write_text(DESCRIPTOR % ("ffffffff", "", 8, "base.raw"), "utf-8")
    with pytest.raises(Exception, match=r"base\.raw.*no Landlock"):
        open_graph(images / "list.vmdk", driver="vmdk")
    graph_of = open_graph(path, any_file=True)
    assert len(graph_of.files) == 2
    graph_of.close()
    write_qcow2(path, backing=b"")
    assert len(open_graph(path).files) == 1


@needs_landlock
def test_sandbox(images: Path, secret: Path) -> None:
    """A program in the sandbox reads the given file, and no other; it has no variables."""
    (images / "given").write_bytes(b"given")
    script = (
        "import os, socket\n"
        "def attempt(action):\n"
        "    try: action()\n"
        "    except OSError as error: print(type(error).__name__)\n"
        "    else: print('done')\n"
        "print(open('/proc/self/fd/100').read())\n"
        f"attempt(lambda: open({str(images / 'given')!r}))\n"
        f"attempt(lambda: open({str(secret)!r}))\n"
        f"attempt(lambda: os.listdir({str(images)!r}))\n"
        f"attempt(lambda: open({str(images / 'new')!r}, 'w'))\n"
        f"attempt(lambda: open({str(images / 'given')!r}, 'r+'))\n"
        "attempt(lambda: os.listdir('/usr/share'))\n"
        "attempt(lambda: socket.create_connection(('127.0.0.1', 1)))\n"
        "print(sorted(set(os.environ) - {'LC_CTYPE'}))\n"
    )
    with (images / "given").open("rb") as given, (images / "out").open("w+b") as out:
        command = launch_command(
            [str(Path(sys.executable).resolve()), "-I", "-S", "-c", script], [given.fileno()], 0
        )
        subprocess.run(command, pass_fds=[given.fileno()], stdout=out, stderr=out, check=False)
        out.seek(0)
        lines = out.read().decode().splitlines()
    assert lines[:7] == ["given", "done", *["PermissionError"] * 5]
    tcp = "PermissionError" if landlock_version() >= 4 else "ConnectionRefusedError"
    assert lines[7:9] == [tcp, "['LISTEN_FDS', 'LISTEN_PID']"]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ([], [(0, 0), (65536, 65536), (30, 30)]),
        (["--cpu=20:20", "--fsize=5000:5000"], [(0, 0), (5000, 5000), (20, 20)]),
        (["--cpu=20:40", "--fsize=5000:unlimited"], [(0, 0), (65536, 65536), (30, 30)]),
    ],
)
def test_lower_limits_of_the_user_stay(
    limits: list[str], expected: list[tuple[int, int]], images: Path
) -> None:
    """A program starts where the user has lower limits than the sandbox, which stay in force."""
    script = (
        "from resource import *\n"
        "print([getrlimit(each) for each in (RLIMIT_CORE, RLIMIT_FSIZE, RLIMIT_CPU)])"
    )
    (images / "given").touch()
    with (images / "given").open("rb") as given:
        command = launch_command(
            [str(Path(sys.executable).resolve()), "-I", "-S", "-c", script],
            [given.fileno()],
            None,
            cpu_seconds=30,
        )
        # An ordinary user cannot raise a hard limit.  Root can.
        drop = ["setpriv", "--bounding-set=-sys_resource"] if not os.geteuid() else []
        done = subprocess.run(
            ["prlimit", *limits, "--", *drop, *command],
            pass_fds=[given.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")


@pytest.mark.parametrize("limit", [256, 102, 101])
def test_low_limit_of_open_files(images: Path, limit: int) -> None:
    """A low limit of open files is enough, or one line says what was found and expected."""
    (images / "given").write_text("given", encoding="ascii")
    with (images / "given").open("rb") as given:
        command = launch_command(
            [str(Path(sys.executable).resolve()), "-I", "-S", "-c", "print(open(100).read())"],
            [given.fileno()],
            None,
        )
        done = subprocess.run(
            ["prlimit", f"--nofile={limit}", "--", *command],
            pass_fds=[given.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )
    if limit > 101:
        assert (done.stdout, done.stderr) == ("given\n", "")
    else:
        assert done.stderr.startswith("found a limit of 101 open files, expected 102 or more (see:")


def test_encrypted(images: Path) -> None:
    """An encrypted image is refused with the reason."""
    path = images / "image.qcow2"
    for method, name in ((1, "AES"), (2, "LUKS")):
        write_qcow2(path, encryption=method)
        assert f"found an encrypted image ({name})" in refused(path, 25)


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vhdx", "vdi", "vpc"])
def test_short_file(images: Path, image_format: str) -> None:
    """A file that ends within its header or tables is refused with QEMU's reason if QEMU does."""
    start = qemu.create(images / "image", 1 << 20, image_format=image_format).read_bytes()
    refusals = 0
    for end in (70, 100, 600):
        short = images / f"short-{end}"
        short.write_bytes(start[:end])
        command = ("qemu-img", "info", "-f", image_format, short)
        if qemu.run(*command, codes=(0, 1)).returncode:
            refused(short, 25)
            refusals += 1
    assert refusals


def test_loop(images: Path) -> None:
    """A chain that leads back to itself is refused."""
    for name, base in (("a", b"b.qcow2"), ("b", b"a.qcow2")):
        write_qcow2(images / f"{name}.qcow2", backing=base)
    assert "found a loop" in refused(images / "a.qcow2", 17)


def test_long_chain(images: Path) -> None:
    """A chain of too many files is refused."""
    for number in range(80):
        write_qcow2(images / f"{number}", backing=f"{number + 1}".encode())
    assert "more than 64 files" in refused(images / "0", 17)


@needs_landlock
def test_extents_at_the_end_of_a_long_chain(images: Path) -> None:
    """The extents of the last image of the longest chain do not count as files of the chain."""
    (images / "x.raw").write_bytes(b"x" * 4096)
    (images / "63").write_text(DESCRIPTOR % ("ffffffff", "", 8, "x.raw"), "utf-8")
    write_qcow2(images / "0", backing=b"00")
    content = (images / "0").read_bytes()
    for number in range(63):
        name = f"{number:02}"
        (images / name).write_bytes(content.replace(b"00", f"{number + 1:02}".encode(), 1))
    copy = images / "copy.raw"
    assert qedimg("convert", "-O", "raw", str(images / "00"), str(copy)) == (0, "", "")
    assert copy.read_bytes()[:4096] == b"x" * 4096


def test_strange_headers(images: Path) -> None:
    """Headers whose fields are out of range are refused, in a short time."""
    path = images / "image.qcow2"
    for at, value in ((8, 1 << 63), (8, 1 << 40), (100, 0xFFFFFFFF), (20, 63), (36, 0x7FFFFFFF)):
        write_qcow2(path, backing=b"x")
        found = bytearray(path.read_bytes())
        found[at : at + (8 if at == 8 else 4)] = value.to_bytes(8 if at == 8 else 4, "big")
        path.write_bytes(found)
        begin = time.monotonic()
        code, _output, complaint = qedimg("map", str(path))
        assert code in (17, 25), complaint
        assert complaint.count("\n") == 1
        assert time.monotonic() - begin < 30


def write_qcow2(path: Path, *, backing: bytes = b"", encryption: int = 0) -> None:
    """Make a qcow2 image of 64 KiB with the name of a backing file, which QEMU does not check."""
    path.unlink(missing_ok=True)
    qemu.create(path, 65536, image_format="qcow2")
    found = bytearray(path.read_bytes())
    if backing:
        at = 1024
        found[at : at + len(backing)] = backing
        struct.pack_into(">QI", found, 8, at, len(backing))
    struct.pack_into(">I", found, 32, encryption)
    path.write_bytes(found)


def put_extension(image: bytes, kind: int, value: bytes) -> bytes:
    """Return a qcow2 image in whose header an extension has another value."""
    at = struct.unpack_from(">I", image, 100)[0]
    kept = b""
    while True:
        found, length = struct.unpack_from(">II", image, at)
        whole = 8 + -(-length // 8) * 8
        if not found:
            break
        if found != kind:
            kept += image[at : at + whole]
        at += whole
    new = struct.pack(">II", kind, len(value)) + value.ljust(-(-len(value) // 8) * 8, b"\0")
    start = struct.unpack_from(">I", image, 100)[0]
    header = image[:start] + new + kept + bytes(8)
    return header + image[len(header) :]


def open_graph(path: Path, *, driver: str = "qcow2", any_file: bool = False) -> graph.Graph:
    """Open the files of an image; names are relative to its directory."""

    def opened(name: bytes, image: PosixFile) -> PosixFile:
        return PosixFile.open(str(Path(image.path).parent / os.fsdecode(name)))

    limits: Limits = graph.Limits(opened, any_file=any_file)
    return graph.open_graph(PosixFile.open(str(path)), driver, limits)
