"""Every row of the table of servers in docs/bad-input.md.

The real commands are run.  Each prints one line that the table has, exits with the documented
code, mounts nothing, changes no local file, and ends soon.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support import programs, qemu
from tests.support.disks import build_image
from tests.support.mounted import COMMAND, front, is_mounted
from tests.support.nginx import make_certificate
from tests.support.programs import environment
from tests.support.users import USER_ID, as_user, user_directory
from tests.support.webserver import WebServer, serving

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

MIB: Final = 1 << 20
TABLE: Final = (Path(__file__).parents[2] / "docs" / "bad-input.md").read_text("utf-8")
MAX_SECONDS: Final = 30.0
"""Each command must end within this time, on a machine that is busy."""
TIMEOUT_SECONDS: Final = 0.6
"""The option of each command for the time of all attempts."""
LONG_TIMEOUT: Final = "25"
"""That option for what ends with the first attempt, also on a busy machine."""
OUTAGE: Final = "; what is not in the cache cannot be read"
EXPIRED: Final = (
    b"<Error><Code>ExpiredToken</Code>"  # as the store says it
    b"<Message>The provided token has expired.</Message></Error>"
)
LOCAL_NAMES: Final = ("vm.qed", "over.qed")


@dataclass
class Place:
    """What a command finds around it.

    Attributes:
        server: A web server, which is also the endpoint of a store.
        directory: The working directory.
        url: The URL that the command gets.
        variables: What the environment has besides.
        options: Options of qedimg; those of a mount follow from them.
    """

    server: WebServer
    directory: Path
    url: str
    variables: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)

    def use_store(self) -> None:
        """Read the object by the protocol of S3."""
        self.url = "s3://images/disk.qed"
        self.variables |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server.port}",
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "hush",
        }

    def replace_library(self, name: str, **files: str) -> None:
        """Put a module with some files in the place of an installed library."""
        package = self.directory.parent / "libraries" / name
        package.mkdir(parents=True)
        for file, text in files.items():
            (package / f"{file}.py").write_text(text)
        self.variables["PYTHONPATH"] = f"{package.parent}:{environment()['PYTHONPATH']}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Give a server with an image, and a directory with a local image and an overlay over it."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "SSL_CERT")) or name.lower().endswith(
            "_proxy"
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "work"
    directory.mkdir()
    (directory / "mnt").mkdir()
    content = bytes(build_image(MIB))
    for name in LOCAL_NAMES:
        (directory / name).write_bytes(content)
    with serving(content) as server:
        yield Place(server, directory, server.url)


def run(place: Place, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in its directory; it must end soon."""
    begin = time.monotonic()
    done = programs.run(
        program, *words, timeout=120, cwd=place.directory, variables=place.variables
    )
    assert time.monotonic() - begin < MAX_SECONDS
    return done


def line_of(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Return the only line of a command that failed with a code, without the command's name."""
    assert done.returncode == code, done
    assert done.stdout == "", done
    assert done.stderr.count("\n") == 1, done
    assert done.stderr.startswith(("qedimg: ", "qedfuse: ")), done
    assert "hush" not in done.stderr
    return done.stderr.partition(": ")[2].rstrip("\n")


def in_table(place: Place, line: str) -> str:
    """Return a line as the table has it."""
    for found, shown in {
        f"{place.server.url}": "https://example.org/vm.qed",
        "s3://images/disk.qed": "s3://images/vm.qed",
        "https://127.0.0.1:9/": "https://example.org/",
        "https://nosuch.invalid/": "https://example.org/",
        str(place.directory): "/srv",
        f"{shlex.quote(sys.prefix)}/bin/": "/opt/qedfuse/bin/",
    }.items():
        line = line.replace(found, shown)
    line = re.sub(r"\(attempts: \d+\)", "(attempts: 4)", line)
    # How long a request is depends on the times of the reads.
    line = re.sub(r"breaks off, expected \d+ bytes", "breaks off, expected 262144 bytes", line)
    return re.sub(r"https://example\.org/disk\.qed|https://127.0.0.1:\d+/images/disk.qed",
                  "https://example.org/vm.qed", line)  # fmt: skip


def check(place: Place, code: int, action: Callable[[], str]) -> str:
    """Run a command that fails; assert that nothing changed, and that the table has its line."""
    before = {path.name: path.read_bytes() for path in place.directory.iterdir() if path.is_file()}
    line = action()
    after = {path.name: path.read_bytes() for path in place.directory.iterdir() if path.is_file()}
    assert after == before
    assert not is_mounted(place.directory / "mnt")
    shown = in_table(place, line)
    rows = [row for row in TABLE.splitlines() if f"{shown}`" in row or f"{shown}{OUTAGE}" in row]
    assert rows, f"docs/bad-input.md has no row for: {shown}"
    # The table has the code of a mount; qedimg has code 1 in its place of 2.
    stated = (f" {code} |", " 2 |") if code == 1 else (f" {code} |",)
    assert any(row.endswith(stated) for row in rows), rows
    return line


def refused(place: Place, code: int = 22) -> None:
    """Assert that neither qedimg nor a mount uses the URL, with the same line."""
    options = {"remote-timeout": str(TIMEOUT_SECONDS), **place.options}
    words = [f"--{name}={value}" for name, value in options.items()]
    mounted = ",".join(f"{name.replace('-', '_')}={value}" for name, value in options.items())
    code_of_qedimg = 1 if code == 2 else code

    def convert() -> str:
        given = ("convert", "-O", "raw", *words, place.url, "copy.raw")
        return line_of(run(place, "qedimg", *given), code_of_qedimg)

    def mount() -> str:
        return line_of(run(place, "qedfuse", "-f", "-r", "-o", mounted, place.url, "mnt"), code)

    of_qedimg, of_mount = check(place, code_of_qedimg, convert), check(place, code, mount)
    assert in_table(place, of_qedimg) == in_table(place, of_mount)


# --- at the opening ---------------------------------------------------------------------


def test_library_for_stores_is_missing(place: Place) -> None:
    """Without obstore the line says what to install."""
    place.use_store()
    place.replace_library("obstore", __init__="raise ModuleNotFoundError(name='obstore')")
    refused(place)


@pytest.mark.parametrize(
    "files",
    [
        {"__init__": "raise ModuleNotFoundError(name='urllib3')"},
        {"__init__": "__version__ = '1.26.12'", "exceptions": "class HTTPError(Exception): pass"},
        {
            "__init__": "__version__ = '2.1.0'",
            "exceptions": "def __getattr__(name): return type(name, (Exception,), {})",
            "response": "class HTTPResponse: pass",
        },
    ],
)
def test_library_for_web_servers_is_missing_or_too_old(place: Place, files: dict[str, str]) -> None:
    """Without urllib3, or with an old version of it, the line says what to install."""
    place.replace_library("urllib3", **files)
    refused(place)


def test_unknown_scheme(place: Place) -> None:
    """The line about an unknown scheme names those that are known."""
    place.url = "ftp://example.org/vm.qed"
    refused(place, 1)


def test_no_such_object(place: Place) -> None:
    """A missing object is named by its URL."""
    place.server.always = "status 404"
    refused(place, 26)
    assert place.server.struck["status 404"] == 2


@pytest.mark.parametrize(
    ("code", "always"), [("NoSuchKey", "status 404"), ("NoSuchBucket", "status 404")]
)
def test_no_such_key_or_bucket(place: Place, code: str, always: str) -> None:
    """A missing bucket and a missing key give different lines."""
    place.use_store()
    place.server.always = "status 404" if always else None
    place.server.refusal = 404
    place.server.error_body = f"<Error><Code>{code}</Code></Error>".encode()
    refused(place, 26)
    assert place.server.struck["status 404"] == 2


def test_no_credentials_for_a_store(place: Place) -> None:
    """A private bucket without credentials: the line says what to set."""
    place.use_store()
    del place.variables["AWS_ACCESS_KEY_ID"], place.variables["AWS_SECRET_ACCESS_KEY"]
    place.server.required = "Credential"
    place.server.error_body = b"<Error><Code>AccessDenied</Code></Error>"
    refused(place, 27)
    assert place.server.authorizations


def test_wrong_credentials_for_a_store(place: Place) -> None:
    """A wrong secret: the line has the reason that the store gives."""
    place.use_store()
    place.server.required = "Credential=another/"
    place.server.error_body = (
        b"<Error><Code>SignatureDoesNotMatch</Code><Message>The request signature we calculated "
        b"does not match the signature you provided. Check your key.</Message></Error>"
    )
    refused(place, 27)
    assert any("Credential=me/" in found for found in place.server.authorizations)


def test_expired_credentials_for_a_store(place: Place) -> None:
    """A token that has expired is refused credentials, whatever the status is."""
    place.use_store()
    place.server.required, place.server.refusal = "Credential=another/", 400
    place.server.error_body = EXPIRED
    refused(place, 27)


def test_wrong_credentials_for_a_web_server(place: Place) -> None:
    """A wrong password: the line does not have it."""
    secrets = place.directory.parent / "secrets"
    secrets.touch(0o600)
    secrets.write_text(f"WEB_HOST=127.0.0.1:{place.server.port}\nWEB_USER=me\nWEB_PASSWORD=hush\n")
    place.options["credentials"] = str(secrets)
    place.server.required, place.server.refusal = "another", 401
    refused(place, 27)
    assert all(found.startswith("Basic ") for found in place.server.authorizations)


def test_no_credentials_for_a_web_server(place: Place) -> None:
    """A server that asks for a password: the line says how to give one."""
    place.server.required, place.server.refusal = "Basic", 401
    refused(place, 27)


def test_incomplete_credentials(place: Place) -> None:
    """A file that has credentials without a host is refused before any request."""
    secrets = place.directory.parent / "secrets"
    secrets.touch(0o600)
    secrets.write_text("WEB_TOKEN=hush\n")
    place.options["credentials"] = str(secrets)
    refused(place)
    assert not place.server.authorizations


def test_half_a_key(place: Place) -> None:
    """A key without its secret is refused before any request."""
    place.use_store()
    del place.variables["AWS_SECRET_ACCESS_KEY"]
    refused(place)
    assert not place.server.authorizations


def test_control_character_in_a_token(place: Place) -> None:
    """A token with the end of a line, at which obstore panics, is refused before any request."""
    place.use_store()
    place.variables |= {"AWS_SESSION_TOKEN": "hush\n"}
    refused(place)
    assert not place.server.authorizations


@pytest.mark.parametrize(
    ("scheme", "variables"),
    [
        ("az", {}),
        ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "/nosuch.json"}),
        (
            "az",
            {
                "AZURE_STORAGE_ACCOUNT_NAME": "account",
                "AZURE_STORAGE_ENDPOINT": "http://10.0.0.1/account",
            },
        ),
    ],
)
def test_incomplete_variables_of_a_store(
    place: Place, scheme: str, variables: dict[str, str]
) -> None:
    """Variables that configure no usable store are named."""
    place.url = f"{scheme}://images/vm.qed"
    place.variables |= variables
    refused(place)


def test_no_ranges(place: Place) -> None:
    """A server that ignores ranges is refused."""
    place.server.always = "no range"
    refused(place)
    assert place.server.struck["no range"] == 2


def test_no_validator(place: Place) -> None:
    """A server that says nothing about versions is refused, unless that is allowed."""
    place.server.etag, place.server.modified = "", None
    refused(place)
    assert len(place.server.requests) == 2


def test_certificate_that_is_not_trusted(place: Place, tmp_path: Path) -> None:
    """A certificate of an unknown authority is refused at the first attempt."""
    certificate = make_certificate(tmp_path)
    both = tmp_path / "both.pem"
    both.write_text(certificate.read_text() + (tmp_path / "key.pem").read_text())
    with serving(place.server.content, both) as server:
        place.url = server.url
        place.options["remote-timeout"] = LONG_TIMEOUT
        refused(place)
        assert not server.authorizations


def test_unknown_host(place: Place) -> None:
    """A host that no name server knows."""
    place.url = "https://nosuch.invalid/vm.qed"
    refused(place)


def test_refused_connection(place: Place) -> None:
    """A host on which no server listens."""
    place.url = "https://127.0.0.1:9/vm.qed"
    refused(place)


def test_refused_connection_of_a_store(place: Place) -> None:
    """An endpoint on which no server listens."""
    place.use_store()
    place.variables["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    refused(place)


def test_certificate_of_a_store_that_is_not_trusted(place: Place, tmp_path: Path) -> None:
    """A store whose certificate has an unknown authority is refused at the first attempt."""
    certificate = make_certificate(tmp_path)
    both = tmp_path / "both.pem"
    both.write_text(certificate.read_text() + (tmp_path / "key.pem").read_text())
    with serving(place.server.content, both) as server:
        place.use_store()
        place.variables["AWS_ENDPOINT_URL"] = f"https://127.0.0.1:{server.port}"
        place.options["remote-timeout"] = LONG_TIMEOUT
        refused(place)
        assert not server.authorizations


def test_unknown_host_of_a_store(place: Place) -> None:
    """An endpoint that no name server knows."""
    place.use_store()
    place.variables["AWS_ENDPOINT_URL"] = "https://nosuch.invalid"
    refused(place)


def test_store_that_does_not_answer(place: Place) -> None:
    """A store that accepts connections and says nothing."""
    place.use_store()
    place.server.always, place.server.heads_fail = "silence", True
    refused(place)
    assert place.server.struck["silence"] >= 2


def test_proxy_that_cannot_be_reached(place: Place) -> None:
    """A proxy that does not listen is not mistaken for the server, by neither client."""
    place.url = "https://example.org/vm.qed"
    place.variables["ALL_PROXY"] = "http://127.0.0.1:9"
    refused(place)
    place.use_store()
    place.variables["AWS_ENDPOINT_URL"] = "https://store.example"
    refused(place)


def test_proxy_that_is_not_usable(place: Place) -> None:
    """A proxy that a client would ignore is refused; its password is not shown."""
    place.variables["ALL_PROXY"] = "socks5://me:hush@127.0.0.1:9"
    place.url = "https://example.org/vm.qed"
    refused(place)
    place.use_store()
    place.variables |= {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": ""}
    refused(place)
    place.variables |= {"ALL_PROXY": "", "https_proxy": "http://127.0.0.1:9", "REQUEST_METHOD": ""}
    refused(place)
    assert not place.server.authorizations


def test_server_that_does_not_answer(place: Place) -> None:
    """A server that accepts connections and says nothing."""
    place.server.always = "silence"
    refused(place)
    assert place.server.struck["silence"] >= 2


def test_busy_server(place: Place) -> None:
    """A server that asks for patience for longer than there is."""
    place.server.always = "status 503"
    refused(place)
    assert place.server.struck["status 503"] >= 4


def test_redirection_elsewhere(place: Place) -> None:
    """A redirection to another host is not followed; its query is not shown."""
    place.server.always = "redirect elsewhere"
    place.server.elsewhere = "https://other.example/vm.qed?token=hush"
    refused(place)
    assert place.server.struck["redirect elsewhere"] == 2


def test_http_to_another_machine(place: Place) -> None:
    """A URL without TLS is refused before any connection."""
    place.url = "http://example.org/vm.qed"
    refused(place, 1)


def test_user_in_a_url(place: Place) -> None:
    """A URL with a password is refused, and not shown."""
    place.url = "https://me:hush@example.org/vm.qed"
    refused(place, 1)


# --- the cache --------------------------------------------------------------------------


def make_file(path: Path) -> None:
    """Make a file where a directory is expected."""
    path.touch()


def make_foreign(path: Path) -> None:
    """Make a directory of another user."""
    path.mkdir(mode=0o700)
    if os.geteuid() != 0:
        pytest.skip("not root: no directory can be given away")
    os.chown(path, 65534, 65534)


def make_open(path: Path) -> None:
    """Make a directory to which the group may write."""
    path.mkdir()
    path.chmod(0o770)


def make_used(path: Path) -> None:
    """Make a directory with other files, also in the cache's own subdirectory."""
    (path / "qedfuse").mkdir(parents=True, mode=0o700)
    path.chmod(0o700)
    (path / "other").touch()
    (path / "qedfuse" / "other").touch()


@pytest.mark.parametrize("make", [make_file, make_foreign, make_open, make_used])
def test_unusable_cache_directory(place: Place, make: Callable[[Path], None]) -> None:
    """A directory that the user names for the cache, and that cannot be used, is refused."""
    path = place.directory.parent / "given"
    make(path)
    (place.directory / "given").symlink_to(path)
    place.options["cache-dir"] = str(place.directory / "given")
    before = path.stat()
    refused(place, 2)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_cache_directory_that_cannot_be_made(place: Place) -> None:
    """A directory for the cache that the host does not make is refused."""
    place.options["cache-dir"] = "/proc/cache"
    refused(place, 2)


def make_read_only(path: Path) -> None:
    """Make a directory of the tests' ordinary user, in which the user cannot write."""
    path.mkdir(mode=0o500)
    os.chown(path, USER_ID, USER_ID)


@pytest.mark.skipif(os.geteuid() != 0, reason="root writes to each directory; needs another user")
def test_cache_directory_that_cannot_be_written(place: Place) -> None:
    """With such a directory of one's own, the object is read without a cache; one line says so."""
    with user_directory() as home:
        cache, mnt, variables = home / "given", home / "mnt", dict(place.variables)
        make_read_only(cache)
        place.server.content = bytes(build_image(MIB, {3: b"three", 200: b"two hundred"}))
        disk = bytearray(MIB)
        disk[3 * 4096 : 3 * 4096 + 5] = b"three"
        disk[200 * 4096 : 200 * 4096 + 11] = b"two hundred"
        line = (
            f"qedfuse: {cache}/object-.../version-...: cache entry: Permission denied; "
            "going on without a cache"
        )
        assert line.replace(f"qedfuse: {home}", "`/srv") + "`" in TABLE
        options = f"ro,cache_dir={cache}"
        done = as_user(*COMMAND, "-o", options, place.url, mnt, variables=variables)
        try:
            assert done.returncode == 0, done
            found = re.sub(r"(object|version)-[0-9a-f]+", r"\1-...", done.stderr)
            assert found == f"{line}\n"
            digest = as_user("sha256sum", mnt / "disk.raw").stdout.split()[0]
            assert digest == hashlib.sha256(disk).hexdigest()
        finally:
            done = as_user(*COMMAND, "umount", mnt)
        assert done.returncode == 0, done
        assert list(cache.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="root writes to each directory; needs another user")
def test_cache_directory_with_other_files_that_cannot_be_written(place: Place) -> None:
    """If the cache's subdirectory cannot be made in such a directory, the directory is refused."""
    with user_directory() as home:
        cache = home / "given"
        make_read_only(cache)
        (cache / "other").touch()
        done = as_user(*COMMAND, "-o", f"ro,cache_dir={cache}", place.url, home / "mnt")
        line = line_of(done, 2)
        assert line == f"{cache}/qedfuse: cache directory: Permission denied"
        assert f"`{line.replace(str(home), '/srv')}` | 2 |" in TABLE
        assert not is_mounted(home / "mnt")


# --- after the opening ------------------------------------------------------------------


def test_object_that_ends_in_its_tables(place: Place) -> None:
    """An object that is shorter than its header says is refused like a local file."""
    path = place.directory.parent / "disk.qed"
    qemu.create(path, 8 * MIB)
    place.server.content = path.read_bytes()[: 65536 + 1000]
    refused(place, 12)


@pytest.mark.parametrize(
    ("fault", "code"), [("other etag", 23), ("status 404", 23), ("half", 22), ("status 503", 22)]
)
def test_fault_while_reading(place: Place, fault: str, code: int) -> None:
    """What fails after the opening is an error of the whole conversion, which leaves no target."""
    path = place.directory.parent / "disk.qed"
    qemu.create(path, 8 * MIB)
    qemu.io(path, "write -P 3 0 8M", image_format="qed")
    place.server.content = path.read_bytes()
    place.server.healthy = 3
    place.server.always = fault  # type: ignore[assignment]
    # A server that answers has time on a busy machine; other faults last until the limit.
    answers = fault in {"other etag", "status 404"}
    seconds = 25 if answers else TIMEOUT_SECONDS
    words = ("convert", "-O", "raw", f"--remote-timeout={seconds}", place.url, "copy.raw")
    check(place, code, lambda: line_of(run(place, "qedimg", *words), code))
    assert place.server.struck[fault]


def test_credentials_that_expire_in_a_mount(place: Place) -> None:
    """Reads fail while the key is refused, and go on when the file has a new one."""
    path = place.directory.parent / "disk.qed"
    qemu.create(path, 8 * MIB)
    qemu.io(path, "write -P 3 0 8M", image_format="qed")
    place.server.content = path.read_bytes()
    place.use_store()
    secrets = place.directory.parent / "secrets"
    secrets.touch(0o600)
    text = f"AWS_ENDPOINT_URL=http://127.0.0.1:{place.server.port}\nAWS_SECRET_ACCESS_KEY=hush\n"
    secrets.write_text(f"{text}AWS_ACCESS_KEY_ID=old\n")
    place.server.required, place.server.refusal = "Credential=old/", 400
    place.server.error_body = EXPIRED
    with front("-r", "-o", f"credentials={secrets}", place.url, place.directory / "mnt") as mount:
        disk = mount.mountpoint / "disk.raw"
        fd = os.open(disk, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            assert os.pread(fd, 4096, 0) == bytes([3]) * 4096
            place.server.required = "Credential=new/"
            with pytest.raises(OSError, match=os.strerror(errno.EACCES)):
                os.pread(fd, 4096, 6 * MIB)
            assert in_table(place, mount.read_line().partition(": ")[2].rstrip("\n")) in TABLE
            secrets.write_text(f"{text}AWS_ACCESS_KEY_ID=new\n")
            assert os.pread(fd, 4096, 6 * MIB) == bytes([3]) * 4096
            assert "answers again" in mount.read_line()
        finally:
            os.close(fd)


# --- writing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("commit", "URL"),
        ("resize", "URL", "2M"),
        ("rebase", "-b", "vm.qed", "URL"),
        ("compact", "URL"),
        ("check", "-r", "all", "URL"),
        ("create", "URL", "1M"),
        ("convert", "-O", "raw", "vm.qed", "URL"),
    ],
)
def test_command_that_would_change_a_url(place: Place, words: tuple[str, ...]) -> None:
    """A command that writes refuses a URL before any request."""
    given = [place.url if word == "URL" else word for word in words]
    check(place, 1, lambda: line_of(run(place, "qedimg", *given), 1))
    assert not place.server.authorizations


def test_writable_mount(place: Place) -> None:
    """A mount of a URL must say where writes go."""
    check(place, 1, lambda: line_of(run(place, "qedfuse", "-f", place.url, "mnt"), 1))
    assert not place.server.authorizations
