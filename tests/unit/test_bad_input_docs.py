"""Each row of the tables in docs/bad-input.md is claimed by a test.

A row is claimed if a text that a test expects, or a part of it between placeholders, occurs in the
row's message; digits do not count.  Rows of which tests expect only short texts, or whose lines
tests look up in the tables when they run, are in `CLAIMED` with the name of the test.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
MIN_LENGTH: Final = 14
"""Minimum length of a text that claims a row; it also has a space."""
PLACEHOLDER: Final = re.compile(r"\.\*|\{[a-z_]*\}|\[[^\]]*\]\+|\\[dSw]\+")
"""What stands for any text in a format, or in the pattern of a match."""
EXPORTS: Final = "tests/bad_input/test_bad_exports.py"
URLS: Final = "tests/bad_input/test_bad_urls.py"
IMAGES: Final = "tests/bad_input/test_bad_images.py"
HOSTILE: Final = "tests/foreign/test_hostile.py"

CLAIMED: Final = {
    "option partition: found no partition 7": (
        "tests/mounted/test_partitions.py",
        "test_a_missing_partition_is_refused",
    ),
    "refused by backing=none": ("tests/unit/test_backing.py", "test_backing_none"),
    "found a NUL byte in a": (IMAGES, "test_a_bad_header_or_backing_name_is_refused"),
    "found a qcow2 image, expected QED or raw (foreign=qemu": (
        "tests/unit/test_backing.py",
        "test_base_of_another_format",
    ),
    "found the footer of a fixed VHD": ("tests/toolbox/test_commit.py", "test_fixed_vhd"),
    "found a QED image, expected raw": (
        "tests/toolbox/test_commit.py",
        "test_image_that_only_the_option_calls_raw",
    ),
    "found no urllib3": (URLS, "test_library_for_web_servers_is_missing_or_too_old"),
    "found no obstore": (URLS, "test_library_for_stores_is_missing"),
    "found no such bucket": (URLS, "test_no_such_key_or_bucket"),
    "found a control character": (URLS, "test_control_character_in_a_token"),
    "found no name of the account": (URLS, "test_incomplete_variables_of_a_store"),
    "cache directory: File exists": ("tests/remote/test_cache.py", "test_directory_that_is_none"),
    "found no greeting of an NBD server": (EXPORTS, "test_another_server"),
    "found no connection in time": (EXPORTS, "test_a_server_that_accepts_no_connection"),
    "found the end of the connection": (EXPORTS, "test_a_server_that_does_not_greet"),
    "found no socket, expected socket=": (EXPORTS, "test_a_query_that_is_not_valid"),
    "URL query: found user": (EXPORTS, "test_a_query_that_is_not_valid"),
    "nbd: found a qcow2 image": (EXPORTS, "test_an_export_in_another_format"),
    "found no reply in time": (EXPORTS, "test_a_mount_whose_server_fails"),
    "found a reply to no request": (EXPORTS, "test_a_mount_whose_server_fails"),
    "Unsupported qcow2 version 0": (
        "tests/toolbox/test_convert.py",
        "test_the_base_as_an_option_of_the_format",
    ),
    "header field capacity": (HOSTILE, "test_vmdk_with_hidden_list"),
    "no Landlock to confine QEMU": (HOSTILE, "test_without_landlock"),
    'Failed to get shared "write" lock': (
        "tests/foreign/test_process.py",
        "test_in_use",
    ),
    "base.qcow2: found a qcow2 image, expected a local file": (
        EXPORTS,
        "test_an_export_in_another_format",
    ),
    "expected a different name for each": (
        "tests/mounted/test_mount_start.py",
        "test_refusals_before_the_mount_leave_no_trace",
    ),
    'bad.qed: in use: Failed to get "write" lock': (
        IMAGES,
        "test_an_image_open_in_qemu_is_refused",
    ),
    "/dev/fuse: found nothing": (
        "tests/unit/test_mount_mountpoint.py",
        "test_a_missing_device_is_explained",
    ),
    "expected a line user_allow_other": (
        "tests/mounted/test_mount_start.py",
        "test_missing_permissions_are_explained",
    ),
    "does not answer (waited": (
        "tests/mounted/test_stats.py",
        "test_a_stopped_server_is_reported_in_time",
    ),
    "found an impossible value": (
        "tests/mounted/test_stats.py",
        "test_a_server_with_impossible_values",
    ),
    "option foo: unknown": (
        "tests/mounted/test_mount_start.py",
        "test_refusals_before_the_mount_leave_no_trace",
    ),
    "found no library libseccomp": (
        "tests/mounted/test_sandbox.py",
        "test_strict_needs_every_part",
    ),
}
"""For a part of a row's message: the file and the name of the test that claims the row."""


def normal(text: str) -> str:
    """Return a text without backslashes, and with 0 in place of each number."""
    return re.sub(r"[0-9]+", "0", text.replace("\\", ""))


def rows() -> Iterator[tuple[int, str]]:
    """Yield the number of the line of each row, and its message.

    A row that refers to other rows in place of a message is left out.
    """
    lines = (ROOT / "docs/bad-input.md").read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("|") or line.startswith(("| ---", "| bad input")):
            continue
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        message = " ".join(re.findall(r"`([^`]*)`", cells[1]))
        if message:
            yield number, message


@cache
def parsed() -> dict[str, ast.Module]:
    """Return the tests, by their paths; this file is left out."""
    paths = (path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8")) for path in paths}


@cache
def expected_texts() -> frozenset[str]:
    """Return the parts of the texts in all tests that are long enough; docstrings are left out."""
    found = set()
    for module in parsed().values():
        bare = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
        for node in ast.walk(module):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) in bare:
                    continue
                for line in node.value.splitlines():
                    found |= {
                        normal(part).strip(" :,;()'`\"^$|") for part in PLACEHOLDER.split(line)
                    }
    return frozenset(text for text in found if len(text) >= MIN_LENGTH and " " in text)


@pytest.mark.parametrize(("line", "message"), list(rows()))
def test_each_row_is_claimed(line: int, message: str) -> None:
    """Each row of the tables has a test that expects its message."""
    text = normal(message)
    is_expected = any(each in text for each in expected_texts())
    is_listed = any(part in message for part in CLAIMED)
    assert is_expected or is_listed, f"line {line}: no test claims: {message}"


@pytest.mark.parametrize("part", CLAIMED)
def test_the_named_tests_exist(part: str) -> None:
    """A part of a message in `CLAIMED` is in the tables, and its test exists."""
    assert any(part in message for _, message in rows())
    path, name = CLAIMED[part]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = {node.name for node in ast.walk(parsed()[path]) if isinstance(node, kinds)}
    assert name in names


def test_a_row_without_a_test_is_found() -> None:
    """The rule refuses a row that nothing claims."""
    with pytest.raises(AssertionError, match="line 7: no test claims"):
        test_each_row_is_claimed(7, "vm.qed: found a teapot, expected a kettle")
