"""The services of the clouds that give a machine or container the key of its role."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final

_CLOUD_MACHINES: Final = {
    "s3": ("sys_vendor", "Amazon EC2"),
    "gs": ("product_name", "Google Compute Engine"),
    "az": ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"),
}
"""For each cloud a file in `_DMI`, and the content of the file on a machine of this cloud."""
_DMI: Final = "/sys/class/dmi/id"
"""The directory in which the kernel shows the identification that the firmware gives."""


def is_cloud_machine(scheme: str) -> bool:
    """Return whether this is a machine of the cloud with the stores of ``scheme``.

    The result is kept, because the sandbox of a mount forbids to read the identification.
    """
    name, expected = _CLOUD_MACHINES[scheme]
    return _firmware_text(name) == expected


@functools.cache
def _firmware_text(name: str) -> str:
    """Return the text of a file in `_DMI`; empty if the file cannot be read."""
    try:
        return Path(_DMI, name).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
