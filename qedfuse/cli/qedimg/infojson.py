"""The JSON of ``qedimg info``: the keys that qemu-img prints, and more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qedfuse.ondisk.constants import SECTOR
from qedfuse.remote.address import without_secrets

if TYPE_CHECKING:
    from qedfuse.tools.inspection.details import Details
    from qedfuse.tools.inspection.info import ImageInfo, QedInfo
    from qedfuse.tools.inspection.rawheader import Bits


def json_value(image: ImageInfo, details: Details | None) -> dict[str, Any]:
    """Return the description of an image as values for JSON, in qemu-img's order of the keys.

    ``details`` is None if the tables and the free list were not read.
    """
    value: dict[str, Any] = {"children": [{"name": "file", "info": _host_file(image)}]}
    qed = image.qed
    backing = image.backing
    if image.backing_format is not None:
        value["backing-filename-format"] = image.backing_format
    value["virtual-size"] = image.virtual_size
    value["filename"] = without_secrets(image.path)
    if qed is not None:
        value["cluster-size"] = qed.header.values.get("cluster_size")
    value |= {"format": image.format, "actual-size": image.disk_usage}
    if qed is not None:
        properties = _qed_properties(image, qed, details)
        value["format-specific"] = {"type": "qed", "data": properties}
    if backing is not None:
        value["full-backing-filename"] = without_secrets(backing.path)
        value["backing-filename"] = without_secrets(backing.name)
    value["dirty-flag"] = qed is not None and qed.need_check
    if qed is not None:
        value["safety"] = _safety(qed)
        value["problems"] = [
            {"code": item.code, "fatal": item.fatal, "message": item.message}
            for item in qed.problems
        ]
    return value


def _host_file(image: ImageInfo) -> dict[str, Any]:
    """Describe the host's file that stores an image, as qemu-img does since version 8.0."""
    return {
        "children": [],
        "virtual-size": -(-image.file_size // SECTOR) * SECTOR,
        "filename": without_secrets(image.path),
        "format": "file",
        "actual-size": image.disk_usage,
        "format-specific": {"type": "file", "data": {}},
        "dirty-flag": False,
    }


def _qed_properties(image: ImageInfo, qed: QedInfo, details: Details | None) -> dict[str, Any]:
    """Return the properties that only a QED image has."""
    fields = qed.header.values
    properties: dict[str, Any] = {
        "file-length": image.file_size,
        "table-size": fields.get("table_size"),
        "header-size": fields.get("header_size"),
        "l1-table-offset": fields.get("l1_table_offset"),
        "features": {
            "incompatible": _bits(qed.header.bits("features")),
            "compatible": _bits(qed.header.bits("compat_features")),
            "autoclear": _bits(qed.header.bits("autoclear_features")),
        },
        "need-check": qed.need_check,
        "free-list": _free_list(qed, details),
        "l2-tables": qed.l2_tables,
        "l2-tables-possible": qed.max_l2_tables,
    }
    if qed.backing is not None:
        properties["resolved-backing-filename"] = without_secrets(qed.backing.resolved)
    if details is not None and details.allocation is not None:
        counted = details.allocation
        properties["allocation"] = {
            "l2-tables": counted.l2_tables,
            "bad-tables": counted.bad_tables,
            "data-clusters": counted.data,
            "zero-clusters": counted.zero,
        }
    return properties


def _bits(bits: Bits) -> dict[str, Any]:
    """Return a field of feature bits: its value, names of known bits, numbers of unknown bits."""
    return {"value": bits.value, "names": list(bits.names), "unknown-bits": list(bits.unknown)}


def _free_list(qed: QedInfo, details: Details | None) -> dict[str, Any]:
    """Describe the persistent free list, or only its presence if the list was not read."""
    if not qed.has_free_list:
        return {"present": False}
    found = None if details is None else details.free_list
    return {"present": True} if found is None else found.as_json()


def _safety(qed: QedInfo) -> dict[str, Any]:
    """Return the facts by which a service can decide whether to accept an untrusted image."""
    backing, bits = qed.backing, qed.header.bits("features")
    return {
        "has-backing": qed.names_backing,
        "absolute": backing is not None and backing.absolute,
        "scheme": None if backing is None else backing.scheme,
        "escapes-directory": qed.backing_escapes,
        "flags": [*bits.names, *bits.unknown],
        "need-check": qed.need_check,
        "safe-to-mount": qed.mountable and qed.sound and not qed.backing_escapes,
    }
