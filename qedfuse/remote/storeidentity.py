"""How requests to an object store are signed: keys, files with credentials, and cloud metadata.

obstore itself reads the environment.  This module changes four things:

- Credentials in a file are never combined with credentials in the environment.
- Without credentials, requests are anonymous, except on machines that have an instance metadata
  service.  obstore would wait for such a service on every machine.
- An incomplete configuration of a role is refused.  obstore would ignore it, and ask the instance
  metadata service for another role.
- The credentials file of Amazon's command-line tool is read.
"""

from __future__ import annotations

import configparser
import errno
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qedfuse.remote.client import UnusableError
from qedfuse.remote.keyservices import is_cloud_machine
from qedfuse.remote.storevariables import (
    AMAZON_DEFAULT_FILE,
    CONTAINER_VARIABLES,
    GOOGLE_DEFAULT_FILE,
    GOOGLE_METADATA_VARIABLES,
    KEY_VARIABLES,
    STS_ENDPOINT_VARIABLES,
    WEB_IDENTITY_VARIABLES,
    Variables,
    check_files,
    check_value,
    expand_home,
)
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from obstore.store import S3Credential

    from qedfuse.remote.client import ClientOptions

_CONTAINER_TOKEN_VARIABLES: Final = ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",)


def add_s3_identity(
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
        UnusableError: Only the ID of a key or only its secret is set, the file of Amazon's tools
            cannot be used, or the configuration of a role is incomplete.
    """
    credential = _s3_credential(variables)
    if credential is None:
        if not variables.is_true("AWS_SKIP_SIGNATURE") and (
            _has_role(variables) or (is_amazon and _has_metadata_service("s3", variables))
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

    # A function, because obstore would combine credentials in settings with the environment.
    settings["credential_provider"] = provide
    return True


def _has_role(variables: Variables) -> bool:
    """Return whether variables configure a role, by a web identity or by a container's service.

    Raises:
        UnusableError: A variable that obstore needs for this role is missing or not valid, or a
            file with a token cannot be opened.
    """
    if variables.first(WEB_IDENTITY_VARIABLES):
        _check_set(variables, *WEB_IDENTITY_VARIABLES, "AWS_ROLE_ARN")
        check_files(variables, WEB_IDENTITY_VARIABLES)
        sts = variables.first(STS_ENDPOINT_VARIABLES)
        if sts is not None and not sts.startswith("https://"):
            msg = f"credentials: {STS_ENDPOINT_VARIABLES[0]}: found another scheme, expected https"
            raise UnusableError(msg)
        return True
    relative, full = CONTAINER_VARIABLES
    if variables.first((relative,)):
        return True
    if variables.first((full,)):
        _check_set(variables, full, *_CONTAINER_TOKEN_VARIABLES)
        check_files(variables, _CONTAINER_TOKEN_VARIABLES)
        return True
    return False


def _check_set(variables: Variables, given: str, needed: str) -> None:
    """Check that the variable ``needed`` is set, because ``given`` is.

    Raises:
        UnusableError: The variable is not set.
    """
    if not variables.first((needed,)):
        msg = f"credentials: found {given} alone, expected {given} and {needed}"
        raise UnusableError(msg)


def _s3_credential(variables: Variables) -> S3Credential | None:
    """Return the key in the variables, or else in Amazon's file; None if there is no key."""
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


def add_identity(
    scheme: str, variables: Variables, names: tuple[str, ...], settings: dict[str, Any]
) -> bool:
    """Make requests anonymous if nothing gives credentials; return False if requests are anonymous.

    ``names`` are the names of the variables that give credentials.

    Raises:
        UnusableError: The credentials are partly in the file and partly in the environment.
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
    if variables.first(names) or (scheme == "gs" and _has_google_file()):
        return True
    if _has_metadata_service(scheme, variables):
        return True
    settings["skip_signature"] = True
    return False


def _has_google_file() -> bool:
    """Return whether there is the file with the key of the user of Google's tools."""
    # Path.is_file raises an error if the home directory belongs to another user.
    return os.path.isfile(expand_home(GOOGLE_DEFAULT_FILE))  # noqa: PTH113  see above


def _has_metadata_service(scheme: str, variables: Variables) -> bool:
    """Return whether the machine has an instance metadata service, which can give credentials."""
    if scheme == "s3":
        if variables.is_true("AWS_EC2_METADATA_DISABLED"):
            return False
        if variables.first(("AWS_METADATA_ENDPOINT",)):
            return True
    if scheme == "gs" and any(os.environ.get(name) for name in GOOGLE_METADATA_VARIABLES):
        return True
    return is_cloud_machine(scheme)


def _shared_credentials(variables: Variables) -> tuple[str, str, str]:
    """Return key, secret and token from the credentials file of Amazon's tools, or empty texts.

    A missing file is an error only if a variable names the file or a profile; a missing profile
    only if a variable names the profile.

    Raises:
        UnusableError: The file cannot be read.  A mount then keeps its last key, and does not go on
            with unsigned requests.
    """
    named = variables.first(("AWS_SHARED_CREDENTIALS_FILE",))
    profile = variables.first(("AWS_PROFILE",))
    path = Path(expand_home(named or AMAZON_DEFAULT_FILE))
    shown = printable(str(path))
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except OSError as error:
        is_missing = error.errno in {errno.ENOENT, errno.ENOTDIR}
        if is_missing and named is None and profile is None:
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
