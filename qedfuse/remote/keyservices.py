"""The services that give keys to machines and containers, and the stores that may get these keys.

A cloud assigns a *role* to a machine or a container, and a service of the cloud gives the key of
the role, which is for the stores of the cloud.  On Google and Azure the key is a bearer token,
which each server that gets it can use.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from pathlib import Path
from typing import Final

from qedfuse.errors import UsageError
from qedfuse.remote.address import Address, parse_prefix
from qedfuse.remote.client import UnusableError
from qedfuse.remote.urlsyntax import server_part

_CLOUD_MACHINES: Final = {
    "s3": ("sys_vendor", "Amazon EC2"),
    "gs": ("product_name", "Google Compute Engine"),
    "az": ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"),
}
"""For each cloud a file in `_DMI`, and the content of the file on a machine of this cloud."""
_DMI: Final = "/sys/class/dmi/id"
"""The directory in which the kernel shows the identification that the firmware gives."""
_REGION: Final = r"[a-z]+(?:-[a-z]+)+-[0-9]+"
_CLOUD_HOSTS: Final = {
    # Not every name below amazonaws.com: NAME.REGION.elb.amazonaws.com is a host of a customer.
    "s3": re.compile(
        rf"(?:.+\.)?(?:s3|s3-[a-z0-9-]+|s3express-[a-z0-9-]+)(?:\.dualstack)?(?:\.{_REGION})?"
        r"(?:\.vpce)?\.(?:amazonaws\.com|amazonaws\.com\.cn|api\.aws)"
    ),
    "gs": re.compile(r".+\.googleapis\.com"),
    "az": re.compile(
        r".+\.(?:blob|dfs)\.(?:core\.windows\.net|core\.usgovcloudapi\.net|core\.chinacloudapi\.cn"
        r"|storage\.azure\.net|fabric\.microsoft\.com)"
    ),
}
"""The names of the hosts of each cloud's stores."""
_SERVICE_HOSTS: Final = frozenset(
    # Amazon EKS, EC2; Google.
    ("fd00:ec2::23", "fd00:ec2::254", "fd20:ce::254", "metadata.google.internal")
)
"""The hosts of services for keys that need no TLS, because only this machine can reach them.  Such
hosts are also the loopback and link-local addresses."""


def is_of_cloud(scheme: str, endpoint: str | None) -> bool:
    """Return whether a store is one of the cloud's own.

    Args:
        scheme: The scheme of the store's URLs.
        endpoint: The URL of its endpoint, which is valid; None for the default endpoint.
    """
    if endpoint is None:
        return True
    return _CLOUD_HOSTS[scheme].fullmatch(parse_prefix(endpoint).hostname) is not None


def check_service(name: str, url: str, *, allow_http: bool) -> None:
    """Check the URL of a service that gives keys.

    Args:
        name: The variable that has the URL.
        url: The URL.
        allow_http: Whether a service without TLS may be on any machine.

    Raises:
        UnusableError: The URL is not a valid URL for the web, or it has no TLS although its host
            needs it (`_is_service_host`).
    """
    try:
        address = parse_prefix(server_part(url) or url)
    except UsageError as error:
        msg = f"credentials: {name}: {error}"
        raise UnusableError(msg) from error
    if not address.is_web:
        msg = f"credentials: {name}: found {address.server}, expected https://HOST"
        raise UnusableError(msg)
    if address.scheme == "http" and not (allow_http or _is_service_host(address)):
        msg = (
            f"credentials: {name}: found {address.server} without TLS on another machine, expected "
            "https:// (allow it with allow_http)"
        )
        raise UnusableError(msg)


def _is_service_host(address: Address) -> bool:
    """Return whether a service on this host needs no TLS: no request leaves the local network."""
    if address.is_loopback or address.hostname in _SERVICE_HOSTS:
        return True
    try:
        return ipaddress.ip_address(address.hostname).is_link_local
    except ValueError:
        return False


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
