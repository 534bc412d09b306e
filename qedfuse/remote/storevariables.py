"""The variables that configure an object store, and the checks before obstore reads them.

obstore, the library for object stores, panics at a value that no header or URL can have.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qedfuse.errors import UsageError
from qedfuse.remote.address import parse_prefix
from qedfuse.remote.client import UnusableError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from qedfuse.remote.client import ClientOptions

AMAZON_DEFAULT_FILE: Final = "~/.aws/credentials"
GOOGLE_DEFAULT_FILE: Final = "~/.config/gcloud/application_default_credentials.json"
KEY_VARIABLES: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
ENDPOINT_VARIABLES: Final = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
"""The variables that can give the endpoint of each kind of store."""
REGION_VARIABLES: Final = ("AWS_REGION", "AWS_DEFAULT_REGION")
WEB_IDENTITY_VARIABLES: Final = ("AWS_WEB_IDENTITY_TOKEN_FILE",)
STS_ENDPOINT_VARIABLES: Final = ("AWS_ENDPOINT_URL_STS",)
CONTAINER_VARIABLES: Final = (
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
GOOGLE_VARIABLES: Final = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_BEARER_TOKEN",
)
AZURE_VARIABLES: Final = (
    *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY"),
    *("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_TOKEN"),
    *("AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE"),
    *("AZURE_STORAGE_CLIENT_SECRET", "AZURE_CLIENT_SECRET", "AZURE_CREDENTIAL_TYPE"),
    *("AZURE_IDENTITY_ENDPOINT", "AZURE_MSI_ENDPOINT", "AZURE_USE_AZURE_CLI"),
    "AZURE_STORAGE_USE_EMULATOR",
)
"""Variables that give credentials for Azure, or determine where obstore gets them."""
STORE_VARIABLES: Final = {
    "s3": (ENDPOINT_VARIABLES["s3"],),
    "gs": (ENDPOINT_VARIABLES["gs"],),
    "az": (
        ("AZURE_STORAGE_ACCOUNT_NAME",),
        ENDPOINT_VARIABLES["az"],
        ("AZURE_STORAGE_USE_EMULATOR",),
        ("AZURITE_BLOB_STORAGE_URL",),
    ),
}
"""Groups of variables that determine which store has the bucket or container.  In each group only
the first variable that is set counts."""
GOOGLE_FILE_VARIABLES: Final = (
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
)
"""Variables with the name of a file that obstore reads when it makes a store."""
GOOGLE_METADATA_VARIABLES: Final = ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP")
"""Environment variables that name Google's metadata server, as a host with or without a port."""
FILE_VARIABLES: Final = (
    *("AWS_SHARED_CREDENTIALS_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "AZURE_FEDERATED_TOKEN_FILE"),
    *GOOGLE_FILE_VARIABLES,
)
"""All variables with the name of a file that has a key or a token."""
_WITH_LINES: Final = ("GOOGLE_SERVICE_ACCOUNT_KEY",)
"""Variables whose value may have several lines."""
_CHECKED: Final = {
    "s3": (
        *KEY_VARIABLES,
        *ENDPOINT_VARIABLES["s3"],
        *REGION_VARIABLES,
        *WEB_IDENTITY_VARIABLES,
        *STS_ENDPOINT_VARIABLES,
        *CONTAINER_VARIABLES,
    ),
    "gs": (*GOOGLE_VARIABLES, *ENDPOINT_VARIABLES["gs"]),
    "az": (*AZURE_VARIABLES, *(name for group in STORE_VARIABLES["az"] for name in group)),
}
"""The variables of each kind of store that `check_variables` checks."""


class Variables:
    """The variables of a credentials file, and the environment variables that it does not set.

    A variable with an empty value counts as not set.

    Attributes:
        own: The variables of the file.
    """

    def __init__(self, own: dict[str, str]) -> None:
        self.own = own

    def first(self, names: tuple[str, ...]) -> str | None:
        """Return the value of the first variable of ``names`` that is set; None if none is set.

        All variables of the file precede those of the environment.
        """
        for source in (self.own, os.environ):
            for name in names:
                if source.get(name):
                    return source[name]
        return None

    def values_of_group(self, names: tuple[str, ...]) -> list[str]:
        """Return the values of variables that belong together; empty for each that is not set.

        All come from the file if it sets one of them, and otherwise from the environment.
        """
        source = self.own if any(self.own.get(name) for name in names) else os.environ
        return [source.get(name, "") for name in names]

    def is_true(self, name: str) -> bool:
        """Return whether the value of a variable is 1, true, yes or on."""
        return (self.first((name,)) or "").lower() in {"1", "true", "yes", "on"}


def expand_home(path: str) -> str:
    """Return a path with the home directory, if there is one, in place of ``~``."""
    return os.path.expanduser(path)  # noqa: PTH111  Path.expanduser raises without a home


def key_files(variables: Variables, schemes: Collection[str]) -> Iterator[str]:
    """Yield the files with keys or tokens that the stores of ``schemes`` may read."""
    for name in FILE_VARIABLES:
        path = variables.first((name,))
        if path is not None:
            yield expand_home(path) if name == "AWS_SHARED_CREDENTIALS_FILE" else path
    if "s3" in schemes and not variables.first(("AWS_SHARED_CREDENTIALS_FILE",)):
        yield expand_home(AMAZON_DEFAULT_FILE)
    if "gs" in schemes:
        yield expand_home(GOOGLE_DEFAULT_FILE)


def find_store_id(scheme: str, variables: Variables) -> str:
    """Return a string that identifies the store: the values of `STORE_VARIABLES`, joined."""
    return " ".join(variables.first(names) or "-" for names in STORE_VARIABLES[scheme])


def check_variables(scheme: str, variables: Variables) -> None:
    """Check the variables of a kind of store, and unset those in the environment that are empty.

    Raises:
        UnusableError: A value has a control character, or the name of an account is missing.
    """
    for name in _CHECKED[scheme]:
        # obstore would treat an empty variable as set; Amazon's tools ignore it.
        if os.environ.get(name) == "":
            del os.environ[name]
        if name not in _WITH_LINES:
            check_value(name, variables.first((name,)) or "")
    if scheme == "az" and not (
        variables.first(("AZURE_STORAGE_ACCOUNT_NAME",))
        or variables.is_true("AZURE_STORAGE_USE_EMULATOR")
    ):
        msg = "found no name of the account, expected it in AZURE_STORAGE_ACCOUNT_NAME"
        raise UnusableError(msg)


def check_value(name: str, value: str) -> None:
    """Check that the value of a variable can be sent in an HTTP header.

    Raises:
        UnusableError: The value has a control character, such as the end of a line.
    """
    if any(character < " " or character == "\x7f" for character in value):
        msg = (
            f"credentials: {name}: found a control character, such as the end of a line, "
            "expected none"
        )
        raise UnusableError(msg)


def check_files(variables: Variables, names: tuple[str, ...]) -> None:
    """Check that the files which the variables ``names`` name can be opened.

    Raises:
        UnusableError: A file cannot be opened.
    """
    for name in names:
        path = variables.first((name,))
        if path is None:
            continue
        try:
            with Path(path).open("rb"):
                pass
        except OSError as error:
            msg = f"credentials: {name}: {printable(path)}: {error.strerror}"
            raise UnusableError(msg) from error


def find_endpoint(
    variables: Variables, names: tuple[str, ...], options: ClientOptions
) -> str | None:
    """Return the URL of the endpoint of a store; None if no variable of ``names`` gives one.

    Raises:
        UnusableError: The endpoint is not the URL of a web server.  Or it lies on another machine
            and has no TLS, and ``options.allow_http`` is False.
    """
    text = variables.first(names)
    if text is None:
        return None
    try:
        endpoint = parse_prefix(text)
    except UsageError as error:
        msg = f"endpoint: {error}"
        raise UnusableError(msg) from error
    if not endpoint.is_web:
        msg = f"endpoint: found {endpoint.shown}, expected https://HOST"
        raise UnusableError(msg)
    if endpoint.scheme == "http" and not (endpoint.is_loopback or options.allow_http):
        msg = (
            f"endpoint: found {endpoint.shown} without TLS on another machine, expected https:// "
            "(allow it with allow_http)"
        )
        raise UnusableError(msg)
    return endpoint.url.rstrip("/")
