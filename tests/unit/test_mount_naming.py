"""Which images are mounted, and their names in the mount."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from qedfuse.errors import HostError, MountpointError, NotQedError
from qedfuse.mount.images.naming import Source, disk_file_name, find_sources

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = b"QED\0"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/a/vm.qed", b"vm.raw"),
        ("disk.img", b"disk.img.raw"),
        ("disk", b"disk.raw"),
        ("vm.QED", b"vm.QED.raw"),
        (".qed", b".qed.raw"),
        ("a.qed.qed", b"a.qed.raw"),
        (os.fsdecode(b"\xff.qed"), b"\xff.raw"),
    ],
)
def test_names(path: str, name: bytes) -> None:
    """A name in the mount is that of the image without its suffix for QED."""
    assert disk_file_name(path) == name


def test_a_directory_stands_for_its_images(tmp_path: Path) -> None:
    """A directory as source means the files in it with the magic, whatever their names."""
    (tmp_path / "b.qed").write_bytes(MAGIC + b"...")
    (tmp_path / "a.img").write_bytes(MAGIC)
    (tmp_path / "c.qed").write_bytes(b"no")
    (tmp_path / "d.qed").mkdir()
    os.mkfifo(tmp_path / "e.qed")
    (tmp_path / "f.qed").symlink_to("nowhere")
    (tmp_path / "g.qed").symlink_to("b.qed")
    assert find_sources([str(tmp_path)]) == [
        Source(f"{tmp_path}/a.img", b"a.img.raw", is_named=False),
        Source(f"{tmp_path}/b.qed", b"b.raw", is_named=False),
        Source(f"{tmp_path}/g.qed", b"g.raw", is_named=False),
    ]


def test_files_are_taken_without_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the user names is not probed, and its path becomes absolute."""
    monkeypatch.chdir(tmp_path)
    assert find_sources(["x.qed"]) == [Source(f"{tmp_path}/x.qed", b"x.raw")]


def test_clashes_name_both(tmp_path: Path) -> None:
    """Two images with the same name in the mount are refused, and the message names both."""
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "vm.qed").write_bytes(MAGIC)
    with pytest.raises(MountpointError) as caught:
        find_sources([str(tmp_path / "one"), str(tmp_path / "two" / "vm.qed")])
    message = str(caught.value)
    assert "vm.raw" in message
    assert f"{tmp_path}/one/vm.qed" in message
    assert f"{tmp_path}/two/vm.qed" in message


def test_a_directory_without_images_is_refused(tmp_path: Path) -> None:
    """A directory without images is refused."""
    with pytest.raises(NotQedError, match="found no QED image"):
        find_sources([str(tmp_path)])


def test_an_unreadable_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreadable directory is refused with the host's reason."""

    def deny(_path: str) -> list[str]:
        raise PermissionError(13, "denied")

    monkeypatch.setattr(os, "listdir", deny)
    with pytest.raises(HostError, match="cannot open: Permission denied"):
        find_sources([str(tmp_path)])
