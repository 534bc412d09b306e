"""How requests to an object store are signed: keys, files with credentials, and cloud metadata.

obstore itself reads the environment.  This module changes four things:

- Credentials in a file are never combined with credentials in the environment.
- Without credentials, requests are anonymous.  Only a machine of the cloud whose store it is asks
  the instance metadata service for a key.  obstore would wait for such a service on every machine.
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
from typing import TYPE_CHECKING, Any, Final

from qedfuse.remote.client import UnusableError
from qedfuse.remote.keyservices import check_service, is_cloud_machine
from qedfuse.remote.storevariables import (
    AMAZON_DEFAULT_FILE,
    AZURE_AUTHORITY_VARIABLES,
    AZURE_KEY_VARIABLES,
    AZURE_SERVICE_VARIABLES,
    AZURE_VARIABLES,
    CONTAINER_TOKEN_VARIABLES,
    CONTAINER_VARIABLES,
    GOOGLE_DEFAULT_FILE,
    GOOGLE_FILE_VARIABLES,
    GOOGLE_METADATA_VARIABLES,
    GOOGLE_VARIABLES,
    KEY_VARIABLES,
    METADATA_VARIABLES,
    SKIP_VARIABLES,
    STS_ENDPOINT_VARIABLES,
    WEB_IDENTITY_VARIABLES,
    Variables,
    check_files,
    check_value,
    expand_home,
    read_key_file,
)
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from obstore.store import S3Credential

    from qedfuse.remote.client import ClientOptions

_PROFILE_KEY: Final = "aws_access_key_id"
_PROFILE_SECRET: Final = "aws_secret_access_key"  # noqa: S105  a name
"""The two parts of a key in a profile of Amazon's credentials file."""


def add_s3_identity(
    variables: Variables,
    settings: dict[str, Any],
    *,
    is_amazon: bool,
    allow_http: bool,
    renewed: Callable[[], ClientOptions] | None,
) -> bool:
    """Add to the settings how requests are signed; return False if requests are anonymous.

    Args:
        variables: The variables of the credentials file and of the environment.
        settings: The settings of the store.
        is_amazon: Whether the store is Amazon's own.
        allow_http: Whether a service for keys may be on another machine without TLS.
        renewed: Reads the file of the option ``credentials`` again, for each request; None keeps
            the first key.

    Raises:
        UnusableError: Only the ID of a key or only its secret is set, the file of Amazon's tools
            cannot be used, or the configuration of a role is incomplete or not valid.
    """
    credential = _s3_credential(variables)
    if variables.is_true(SKIP_VARIABLES["s3"]):
        settings["skip_signature"] = True
        return False
    if credential is None:
        if _has_role(variables, allow_http=allow_http) or (
            is_amazon and _has_machine_role(variables, allow_http=allow_http)
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


def _has_role(variables: Variables, *, allow_http: bool) -> bool:
    """Return whether variables configure a role, by a web identity or by a container's service.

    Raises:
        UnusableError: A variable that obstore needs for this role is missing or not valid, or a
            file with a token cannot be used.
    """
    if variables.first(WEB_IDENTITY_VARIABLES):
        _check_set(variables, *WEB_IDENTITY_VARIABLES, "AWS_ROLE_ARN")
        sts = variables.first(STS_ENDPOINT_VARIABLES)
        if sts is not None and not sts.startswith("https://"):
            msg = f"credentials: {STS_ENDPOINT_VARIABLES[0]}: found another scheme, expected https"
            raise UnusableError(msg)
        check_files(variables, WEB_IDENTITY_VARIABLES)
        return True
    relative, full = CONTAINER_VARIABLES
    path = variables.first((relative,))
    if path is not None:
        # obstore appends the value to a host, so with another beginning it changes the host.
        if not path.startswith("/"):
            msg = f"credentials: {relative}: found {printable(path)}, expected a path with / first"
            raise UnusableError(msg)
        return True
    url = variables.first((full,))
    if url is not None:
        check_service(full, url, allow_http=allow_http)
        _check_set(variables, full, *CONTAINER_TOKEN_VARIABLES)
        # A newline at the end of such a token is refused; Amazon's libraries do the same.
        check_files(variables, CONTAINER_TOKEN_VARIABLES, is_header=True)
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
    is_other = variables.is_true(SKIP_VARIABLES["s3"]) or variables.first(WEB_IDENTITY_VARIABLES)
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


def add_google_identity(
    variables: Variables, settings: dict[str, Any], *, is_google: bool, allow_http: bool
) -> bool:
    """Add to the settings how requests are signed; return False if requests are anonymous.

    Without variables, credentials are sent only to Google's own stores.

    Args:
        variables: The variables of the credentials file and of the environment.
        settings: The settings of the store.
        is_google: Whether the store is Google's own.
        allow_http: Whether a service for keys may be on another machine without TLS.

    Raises:
        UnusableError: The credentials are partly in the file and partly in the environment, a file
            cannot be used, or the service for keys may not be used.
    """
    _check_origin(variables, GOOGLE_VARIABLES)
    if not variables.is_true(SKIP_VARIABLES["gs"]):
        if variables.has_identity(GOOGLE_VARIABLES):
            check_files(variables, GOOGLE_FILE_VARIABLES)
            return True
        if is_google and _has_google_file():
            return True
        hosts = [(name, os.environ.get(name)) for name in GOOGLE_METADATA_VARIABLES]
        for name, host in hosts:
            if host:
                check_service(name, f"http://{host}", allow_http=allow_http)
        if any(host for _, host in hosts) or (is_google and is_cloud_machine("gs")):
            return True
    settings["skip_signature"] = True
    return False


def add_azure_identity(
    variables: Variables, settings: dict[str, Any], *, is_azure: bool, allow_http: bool
) -> bool:
    """Add to the settings how requests are signed; return False if requests are anonymous.

    If the user has set no variables with credentials, the key of the machine or of its service is
    sent only to Azure's own stores.

    Args:
        variables: The variables of the credentials file and of the environment.
        settings: The settings of the store.
        is_azure: Whether the store is Azure's own.
        allow_http: Whether a service for keys may be on another machine without TLS.

    Raises:
        UnusableError: The credentials are partly in the file and partly in the environment, or the
            service for keys may not be used.
    """
    _check_origin(variables, AZURE_VARIABLES)
    if variables.is_true(SKIP_VARIABLES["az"]):
        settings["skip_signature"] = True
        return False
    for name in AZURE_AUTHORITY_VARIABLES:
        authority = variables.first((name,))
        if authority is not None and authority.startswith("http://"):
            check_service(name, authority, allow_http=allow_http)
    service = next((name for name in AZURE_SERVICE_VARIABLES if variables.first((name,))), "")
    has_machine_role = is_azure and (service or is_cloud_machine("az"))
    if not variables.has_identity(AZURE_VARIABLES) and not has_machine_role:
        settings["skip_signature"] = True
        return False
    url = variables.first((service,))
    if url is not None:
        has_key = variables.first(AZURE_KEY_VARIABLES)
        if not has_key or variables.first(("AZURE_CREDENTIAL_TYPE",)):
            check_service(service, url, allow_http=allow_http)
        # obstore itself would prefer IDENTITY_ENDPOINT in the environment, which Azure sets, to the
        # variables that the user sets.
        settings["msi_endpoint"] = url
    return True


def _check_origin(variables: Variables, names: tuple[str, ...]) -> None:
    """Check that credentials in the file are not completed by those in the environment.

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


def _has_google_file() -> bool:
    """Return whether Google's tools have stored a key of this user in `GOOGLE_DEFAULT_FILE`."""
    # Path.is_file raises an error if the home directory belongs to another user.
    return os.path.isfile(expand_home(GOOGLE_DEFAULT_FILE))  # noqa: PTH113  see above


def _has_machine_role(variables: Variables, *, allow_http: bool) -> bool:
    """Return whether Amazon's instance metadata service may give the key of a role of this machine.

    Raises:
        UnusableError: The service may not be used.
    """
    if variables.is_true("AWS_EC2_METADATA_DISABLED"):
        return False
    (name,) = METADATA_VARIABLES
    url = variables.first((name,))
    if url is not None:
        check_service(name, url, allow_http=allow_http)
        return True
    return is_cloud_machine("s3")


def _shared_credentials(variables: Variables) -> tuple[str, str, str]:
    """Return key, secret and token from the credentials file of Amazon's tools, or empty texts.

    A missing file is an error only if a variable names the file or a profile; a missing profile
    only if a variable names the profile.

    Raises:
        UnusableError: The file cannot be read, or has only half of a key.  A mount then keeps its
            last key, and does not go on with unsigned requests.
    """
    named = variables.first(("AWS_SHARED_CREDENTIALS_FILE",))
    profile = variables.first(("AWS_PROFILE",))
    path = expand_home(named or AMAZON_DEFAULT_FILE)
    shown = printable(path)
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        # The empty device may be named, so that no file is read.
        parser.read_string("" if path == os.devnull else read_key_file(path))
    except OSError as error:
        is_missing = error.errno in {errno.ENOENT, errno.ENOTDIR}
        if is_missing and named is None and profile is None:
            return "", "", ""
        msg = f"credentials: {shown}: {error.strerror}"
        raise UnusableError(msg) from error
    except UnusableError as error:
        msg = f"credentials: {shown}: {error}"
        raise UnusableError(msg) from None
    except configparser.Error:
        msg = f"credentials: {shown}: found no valid sections of NAME = VALUE, expected them"
        raise UnusableError(msg) from None
    section = profile or "default"
    if section not in parser:
        if profile is None:
            return "", "", ""
        msg = f"credentials: {shown}: found no profile {printable(section)}, expected it"
        raise UnusableError(msg)
    found = parser[section]
    key, secret = found.get(_PROFILE_KEY, ""), found.get(_PROFILE_SECRET, "")
    if bool(key) != bool(secret):
        msg = (
            f"credentials: {shown}: profile {printable(section)}: found "
            f"{_PROFILE_KEY if key else _PROFILE_SECRET} alone, expected {_PROFILE_KEY} and "
            f"{_PROFILE_SECRET}"
        )
        raise UnusableError(msg)
    return key, secret, found.get("aws_session_token", "")
