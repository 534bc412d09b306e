"""The endpoint and the credentials of an object store, from variables, files and cloud metadata.

obstore itself reads the environment.  This module changes four things:

- Credentials in a file are never combined with credentials in the environment.
- Without credentials, requests are anonymous.  obstore would wait for an instance metadata service,
  which only machines of a cloud have.
- The user must allow an endpoint without TLS.
- The credentials file of Amazon's command-line tool is read.
"""

from __future__ import annotations

import configparser
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from qedfuse.remote.client import UnusableError
from qedfuse.remote.storeerrors import panics_translated, translated
from qedfuse.remote.storevariables import (
    AZURE_VARIABLES,
    CONTAINER_VARIABLES,
    ENDPOINT_VARIABLES,
    GOOGLE_VARIABLES,
    KEY_VARIABLES,
    REGION_VARIABLES,
    STORE_VARIABLES,
    WEB_IDENTITY_VARIABLES,
    Variables,
    check_google_files,
    check_value,
    check_variables,
    find_endpoint,
)
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from obstore.store import ObjectStore, S3Credential

    from qedfuse.remote.address import Address
    from qedfuse.remote.client import ClientOptions

_MAX_RETRIES: Final = 10_000
"""Maximum number of times that obstore repeats a failed request.  The number is so high that only
``retry_seconds`` of `make_store` limits the repetition."""
_MAX_PAUSE_SECONDS: Final = 5.0
"""Maximum pause between two attempts of obstore."""
_PREFIXES: Final = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
"""The prefix of the variables that configure each kind of store."""
_UNKNOWN_TO_OBSTORE: Final = (
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_EC2_METADATA_DISABLED",
)
"""Variables that obstore does not know."""
_GOOGLE_DEFAULT_FILE: Final = "~/.config/gcloud/application_default_credentials.json"
_CLOUD_MACHINES: Final = {
    "s3": ("sys_vendor", "Amazon EC2"),
    "gs": ("product_name", "Google Compute Engine"),
    "az": ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"),
}
"""For each cloud a file in `_DMI`, and the content of the file on a machine of this cloud."""
_DMI: Final = "/sys/class/dmi/id"
"""The directory in which the kernel shows the identification that the firmware gives."""
_HINTS: Final = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


@dataclass(frozen=True, slots=True)
class Store:
    """A configured bucket or container.

    Attributes:
        handle: The store as an object of obstore.
        hint: How to give credentials, for messages; empty if requests have credentials.
        store_id: The values of `STORE_VARIABLES`: the endpoint or account that has the bucket.
    """

    handle: ObjectStore
    hint: str
    store_id: str


def make_store(
    address: Address,
    options: ClientOptions,
    *,
    retry_seconds: float = 0.0,
    read_keys_again: bool = False,
) -> Store:
    """Return the bucket or container of an address; no connection is made yet.

    Args:
        address: The address of an object.
        options: How to connect, and the variables of a credentials file.
        retry_seconds: For how long obstore itself repeats a failed request; 0 for one attempt.
        read_keys_again: Whether the key of an S3 store is read again for each request, so that a
            long upload goes on with the next key when a temporary one expires.

    Raises:
        UnusableError: The variables, or a file with credentials, configure no usable store.
    """
    variables = Variables(dict(options.credentials))
    check_variables(address.scheme, variables)
    prefix = _PREFIXES[address.scheme]
    handled_here = (
        *KEY_VARIABLES,
        *ENDPOINT_VARIABLES["s3"],
        *REGION_VARIABLES,
        *_UNKNOWN_TO_OBSTORE,
    )
    config: Any = {
        name.lower(): value
        for name, value in variables.own.items()
        if name.startswith(prefix) and name not in handled_here and value
    }
    common: dict[str, Any] = {
        "client_options": {
            "connect_timeout": timedelta(seconds=options.connect_seconds),
            "timeout": timedelta(seconds=options.attempt_seconds),
        },
        # `qedfuse.remote.object` repeats reads, for all clients in the same way.
        "retry_config": {
            "max_retries": _MAX_RETRIES if retry_seconds else 0,
            "retry_timeout": timedelta(seconds=retry_seconds),
            "backoff": {"max_backoff": timedelta(seconds=_MAX_PAUSE_SECONDS)},
        },
    }
    endpoint = find_endpoint(variables, ENDPOINT_VARIABLES[address.scheme], options)
    common["client_options"]["allow_http"] = bool(endpoint and endpoint.startswith("http://"))
    try:
        with panics_translated():
            if address.scheme == "s3":
                if endpoint is not None:
                    # obstore prefers this name to all others, so no variable can replace the value.
                    common["aws_endpoint_url_s3"] = endpoint
                common["region"] = variables.first(REGION_VARIABLES) or "us-east-1"
                has_credentials = _add_s3_identity(
                    variables,
                    common,
                    is_amazon=endpoint is None,
                    renewed=options.renewed if read_keys_again else None,
                )
                handle: ObjectStore = S3Store(address.host, config=config, **common)
            elif address.scheme == "gs":
                has_credentials = _add_identity("gs", variables, GOOGLE_VARIABLES, common)
                check_google_files(variables)
                handle = GCSStore(address.host, config=config, **common)
            else:
                has_credentials = _add_identity("az", variables, AZURE_VARIABLES, common)
                handle = AzureStore(address.host, config=config, **common)
    except (BaseError, ValueError) as error:
        raise UnusableError(str(translated(error))) from error
    hint = "" if has_credentials else _HINTS[address.scheme]
    return Store(
        handle, hint, " ".join(variables.first(n) or "-" for n in STORE_VARIABLES[address.scheme])
    )


def _add_s3_identity(
    variables: Variables,
    settings: dict[str, Any],
    *,
    is_amazon: bool,
    renewed: Callable[[], ClientOptions] | None,
) -> bool:
    """Add to the settings how requests are signed; return False if requests are anonymous.

    Args:
        variables: The variables of the credentials file and of the environment.
        settings: The settings of the store.
        is_amazon: Whether the store is Amazon's own.
        renewed: Reads the credentials file again, for each request; None keeps the first key.

    Raises:
        UnusableError: Only the ID of a key or only its secret is set, or the file of Amazon's tools
            cannot be used.
    """
    credential = _s3_credential(variables)
    if credential is None:
        if not variables.is_true("AWS_SKIP_SIGNATURE") and (
            variables.first((*WEB_IDENTITY_VARIABLES, *CONTAINER_VARIABLES))
            or (is_amazon and _has_metadata_service("s3", variables))
        ):
            return True
        settings["skip_signature"] = True
        return False

    last: S3Credential = credential

    def provide() -> S3Credential:
        nonlocal last
        if renewed is None:
            return last
        # Keep the last key if the file cannot be used: another program may just be writing it.
        with suppress(UnusableError):
            last = _s3_credential(Variables(dict(renewed().credentials))) or last
        # The credential expires right away, so obstore calls this function for each request.
        return {**last, "expires_at": datetime.now(UTC)}

    # A function gives the credentials, because obstore would combine credentials that are given as
    # settings with variables of the environment.
    settings["credential_provider"] = provide
    return True


def _s3_credential(variables: Variables) -> S3Credential | None:
    """Return the key in the variables, or else in the credentials file of Amazon's tools.

    Returns None if there is no key.  The file is not read if the variables have a key, or choose
    anonymous requests or a web identity.

    Raises:
        UnusableError: Only the ID of a key or only its secret is set, or the file cannot be used.
    """
    key, secret, token = variables.values_of_group(KEY_VARIABLES)
    if bool(key) != bool(secret):
        key_name, secret_name, _ = KEY_VARIABLES
        found = key_name if key else secret_name
        msg = f"credentials: found {found} alone, expected {key_name} and {secret_name}"
        raise UnusableError(msg)
    is_other = variables.is_true("AWS_SKIP_SIGNATURE") or variables.first(WEB_IDENTITY_VARIABLES)
    if not key and not is_other:
        key, secret, token = _shared_credentials(variables)
    if not key:
        return None
    for name, value in zip(KEY_VARIABLES, (key, secret, token), strict=True):
        check_value(name, value)
    return {
        "access_key_id": key,
        "secret_access_key": secret,
        "token": token or None,
        "expires_at": None,
    }


def _add_identity(
    scheme: str, variables: Variables, names: tuple[str, ...], settings: dict[str, Any]
) -> bool:
    """Make requests anonymous if nothing gives credentials; return False if requests are anonymous.

    Raises:
        UnusableError: The file sets some variables of ``names``, and the environment sets others.
    """
    if any(variables.own.get(name) for name in names):
        # obstore would choose between the credentials in the file and those in the environment.
        for name in names:
            if os.environ.get(name) and not variables.own.get(name):
                msg = (
                    f"credentials: found {name} in the environment beside others in the file, "
                    "expected only those in the file"
                )
                raise UnusableError(msg)
        return True
    if variables.first(names) or (scheme == "gs" and _expand_home(_GOOGLE_DEFAULT_FILE).is_file()):
        return True
    if _has_metadata_service(scheme, variables):
        return True
    settings["skip_signature"] = True
    return False


def _expand_home(path: str) -> Path:
    """Return a path with the home directory in place of ``~``.

    If the user has no home directory, the path is returned unchanged.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111  Path.expanduser raises without a home


def _has_metadata_service(scheme: str, variables: Variables) -> bool:
    """Return whether the machine has an instance metadata service, which can give credentials."""
    if scheme == "s3":
        if variables.is_true("AWS_EC2_METADATA_DISABLED"):
            return False
        if variables.first(("AWS_METADATA_ENDPOINT",)):
            return True
    name, expected = _CLOUD_MACHINES[scheme]
    try:
        return Path(_DMI, name).read_text(encoding="utf-8").strip() == expected
    except (OSError, UnicodeDecodeError):
        return False


def _shared_credentials(variables: Variables) -> tuple[str, str, str]:
    """Return key, secret and token of the profile in the credentials file of Amazon's tools.

    Returns empty texts if there is no complete key.

    Raises:
        UnusableError: The file cannot be read, and a variable names the file or the profile; or the
            content of the file is not valid, or the file has no profile of the name in AWS_PROFILE.
    """
    named = variables.first(("AWS_SHARED_CREDENTIALS_FILE",))
    profile = variables.first(("AWS_PROFILE",))
    path = _expand_home(named or "~/.aws/credentials")
    shown = printable(str(path))
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except OSError as error:
        if named is None and profile is None:
            return "", "", ""
        msg = f"credentials: {shown}: {error.strerror}"
        raise UnusableError(msg) from error
    except (configparser.Error, UnicodeDecodeError):
        msg = f"credentials: {shown}: found no sections of NAME = VALUE, expected them"
        raise UnusableError(msg) from None
    section = profile or "default"
    if section not in parser:
        if profile is None:
            return "", "", ""
        msg = f"credentials: {shown}: found no profile {printable(section)}, expected it"
        raise UnusableError(msg)
    found = parser[section]
    key, secret = found.get("aws_access_key_id", ""), found.get("aws_secret_access_key", "")
    if not key or not secret:
        return "", "", ""
    return key, secret, found.get("aws_session_token", "")
