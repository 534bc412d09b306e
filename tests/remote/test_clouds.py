"""Reading from emulators of the stores of Azure (Azurite) and of Google (fake-gcs-server)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import obstore
import pytest

from qedfuse.cli.qedimg.main import main
from qedfuse.errors import ObjectChangedError, RemoteError
from qedfuse.remote.address import parse_address
from qedfuse.remote.client import ChangedError, ClientOptions, Version
from qedfuse.remote.object import make_client
from qedfuse.remote.opening import open_remote
from qedfuse.remote.options import RemoteOptions
from qedfuse.remote.storesettings import make_store
from tests.support.clouds import (
    Cloud,
    put_into_gcs,
    serving_azurite,
    serving_gcs,
    why_no_azurite,
    why_no_gcs,
)
from tests.support.disks import build_image
from tests.support.remotes import PATIENT, read

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENT: Final = os.urandom(700_001)
"""Two units and a part of one."""
MIB: Final = 1 << 20


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Run an emulator of Azure."""
    if reason := why_no_azurite():
        pytest.skip(f"Azurite: {reason}")
    with serving_azurite(tmp_path_factory.mktemp("azurite") / "store") as cloud:
        yield cloud


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Run an emulator of Google's store."""
    if reason := why_no_gcs():
        pytest.skip(f"fake-gcs-server: {reason}")
    with serving_gcs(tmp_path_factory.mktemp("gcs") / "store") as cloud:
        yield cloud


@pytest.fixture(params=["azurite", "gcs"])
def cloud(
    request: pytest.FixtureRequest,
    bare_environment: None,  # noqa: ARG001  its effect counts
    monkeypatch: pytest.MonkeyPatch,
) -> Cloud:
    """Give each emulator, which the environment names."""
    found: Cloud = request.getfixturevalue(request.param)
    for name, value in found.variables.items():
        monkeypatch.setenv(name, value)
    return found


only_azurite = pytest.mark.parametrize("cloud", ["azurite"], indirect=True)


def put(cloud: Cloud, key: str, content: bytes) -> None:
    """Store an object, or replace it."""
    if cloud.scheme == "gs":
        put_into_gcs(cloud, key, content)
    else:
        address = parse_address(f"{cloud.scheme}://golden/x")
        obstore.put(make_store(address, ClientOptions()).handle, key, content)


@pytest.mark.parametrize("key", ["disk.qed", "a b/ü [1]~(x)!.qed"])
def test_object_is_read(cloud: Cloud, key: str, tmp_path: Path) -> None:
    """An object is read in units, whatever characters its key has."""
    put(cloud, key, CONTENT)
    escaped = key.replace(" ", "%20").replace("ü", "%C3%BC")
    escaped = escaped.replace("[", "%5B").replace("]", "%5D")
    options = RemoteOptions(cache_directory=str(tmp_path), deadlines=PATIENT)
    file = open_remote(parse_address(f"{cloud.scheme}://golden/{escaped}"), options)
    try:
        assert read(file, 0, len(CONTENT)) == CONTENT
    finally:
        file.close()


@pytest.mark.expect_log("/changes: found another version of the object")
def test_replaced_object(cloud: Cloud, tmp_path: Path) -> None:
    """What a replaced object has now is never mixed with what was read of it before."""
    put(cloud, "changes", CONTENT)
    options = RemoteOptions(cache_directory=str(tmp_path), deadlines=PATIENT)
    file = open_remote(parse_address(f"{cloud.scheme}://golden/changes"), options)
    try:
        assert read(file, 0, 100) == CONTENT[:100]
        put(cloud, "changes", CONTENT[::-1])
        with pytest.raises(ObjectChangedError, match="another version"):
            read(file, 600_000, 100)
        assert read(file, 100, 100) == CONTENT[100:200]
    finally:
        file.close()


def test_another_tag(cloud: Cloud) -> None:
    """A request for a version that the store does not have is refused."""
    put(cloud, "disk", CONTENT)
    client = make_client(parse_address(f"{cloud.scheme}://golden/disk"), ClientOptions())
    assert client.head().size == len(CONTENT)
    with pytest.raises(ChangedError):
        next(client.get(0, [100], Version(len(CONTENT), '"another"')))


def test_missing_object_and_container(cloud: Cloud) -> None:
    """A missing object is said to be missing, and so is a container where the store says so."""
    for url, missing in (("golden/none", "object"), ("nothing/none", "(object|bucket)")):
        with pytest.raises(RemoteError, match=f"none: found no such {missing}$"):
            open_remote(parse_address(f"{cloud.scheme}://{url}"), RemoteOptions(deadlines=PATIENT))


def test_command_reads_an_image(cloud: Cloud, tmp_path: Path) -> None:
    """Qedimg copies an image from the store."""
    content = bytes(build_image(MIB))
    put(cloud, "disk.qed", content)
    local = tmp_path / "local.qed"
    local.write_bytes(content)
    copy = tmp_path / "copy.raw"
    cache = f"--cache-dir={tmp_path / 'cache'}"
    url = f"{cloud.scheme}://golden/disk.qed"
    assert main(["convert", "-O", "raw", cache, url, str(copy)]) == 0
    assert main(["compare", "-F", "raw", str(local), str(copy)]) == 0


@only_azurite  # fake-gcs-server checks no credentials
def test_wrong_key(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong key of Azure is refused, in one line without the key."""
    put(cloud, "disk", CONTENT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "aHVzaGh1c2g=")
    with pytest.raises(RemoteError, match="refused: found HTTP status 403") as caught:
        open_remote(parse_address("az://golden/disk"), RemoteOptions(deadlines=PATIENT))
    assert caught.value.errno == 13
    assert "aHVz" not in str(caught.value)
    assert "\n" not in str(caught.value)


@only_azurite  # fake-gcs-server knows no uploads by the interface that obstore uses
def test_publish_to_azure(cloud: Cloud, tmp_path: Path) -> None:
    """Qedimg stores an image in parts, compares it, and refuses to replace it."""
    image = tmp_path / "golden.qed"
    image.write_bytes(bytes(build_image(MIB)))
    url = f"{cloud.scheme}://golden/{os.urandom(4).hex()}.qed"
    assert main(["publish", str(image), url]) == 0
    assert main(["publish", str(image), url]) == 1
    copy = tmp_path / "copy.raw"
    assert main(["convert", "-O", "raw", f"--cache-dir={tmp_path / 'cache'}", url, str(copy)]) == 0
    assert main(["compare", "-F", "raw", str(image), str(copy)]) == 0
