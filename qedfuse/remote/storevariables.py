"""The variables that configure an object store, and the checks before obstore reads them.

obstore, the library for object stores, panics at a value that no header or URL can have.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

from qedfuse.errors import UsageError
from qedfuse.hostio.regular import KIND_NAMES
from qedfuse.remote.address import parse_prefix
from qedfuse.remote.client import UnusableError
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from qedfuse.remote.client import ClientOptions

AMAZON_DEFAULT_FILE: Final = "~/.aws/credentials"
GOOGLE_DEFAULT_FILE: Final = "~/.config/gcloud/application_default_credentials.json"
PREFIXES: Final = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
"""The prefix of the variables that configure each kind of store."""
SKIP_VARIABLES: Final = {scheme: f"{prefix}SKIP_SIGNATURE" for scheme, prefix in PREFIXES.items()}
"""The variable of each kind of store that makes requests anonymous."""
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
METADATA_VARIABLES: Final = ("AWS_METADATA_ENDPOINT",)
CONTAINER_TOKEN_VARIABLES: Final = ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",)
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
AZURE_KEY_VARIABLES: Final = (
    *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY"),
    *("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_TOKEN"),
)
"""Variables that themselves have a key or token for Azure."""
AZURE_VARIABLES: Final = (
    *AZURE_KEY_VARIABLES,
    *("AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE"),
    *("AZURE_STORAGE_CLIENT_SECRET", "AZURE_CLIENT_SECRET", "AZURE_CREDENTIAL_TYPE"),
    *("AZURE_IDENTITY_ENDPOINT", "AZURE_MSI_ENDPOINT", "AZURE_USE_AZURE_CLI"),
    "AZURE_STORAGE_USE_EMULATOR",
)
"""Variables that give credentials for Azure, or determine where obstore gets them."""
AZURE_AUTHORITY_VARIABLES: Final = ("AZURE_STORAGE_AUTHORITY_HOST", "AZURE_AUTHORITY_HOST")
"""Variables with the URL of the server that exchanges a secret of the user for a token."""
AZURE_SERVICE_VARIABLES: Final = (
    "AZURE_IDENTITY_ENDPOINT",
    "AZURE_MSI_ENDPOINT",
    "IDENTITY_ENDPOINT",
)
"""Variables with the URL of Azure's service for keys.  Azure sets the last one on some machines."""
_SWITCHES: Final = ("AZURE_USE_AZURE_CLI", "AZURE_STORAGE_USE_EMULATOR")
"""Variables of `AZURE_VARIABLES` that give credentials only if their value is true."""
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
        *CONTAINER_TOKEN_VARIABLES,
        *METADATA_VARIABLES,
        *("AWS_ROLE_ARN", "AWS_ROLE_SESSION_NAME"),
    ),
    "gs": (*GOOGLE_VARIABLES, *ENDPOINT_VARIABLES["gs"], *GOOGLE_METADATA_VARIABLES),
    "az": (
        *AZURE_VARIABLES,
        *AZURE_SERVICE_VARIABLES,
        *AZURE_AUTHORITY_VARIABLES,
        "IDENTITY_HEADER",
        *(name for group in STORE_VARIABLES["az"] for name in group),
    ),
}
"""The variables of each kind of store that `check_variables` checks."""


_MAX_KEY_FILE_BYTES: Final = 1 << 20
"""Maximum length of a file with a key or token."""


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

    def has_identity(self, names: tuple[str, ...]) -> bool:
        """Return whether one of the variables ``names`` gives credentials."""
        return any(
            self.is_true(name) if name in _SWITCHES else self.first((name,)) for name in names
        )

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
    """Yield the files with keys or tokens that clients of stores may read.

    These are the files that variables name, and the default files for ``schemes``.
    """
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
    known = _CHECKED[scheme]
    for name in [*known, *(name for name in os.environ if name.startswith(PREFIXES[scheme]))]:
        # obstore would treat an empty variable as set; Amazon's tools ignore it.
        if os.environ.get(name) == "":
            del os.environ[name]
    for name in known:
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


def check_files(variables: Variables, names: tuple[str, ...], *, is_header: bool = False) -> None:
    """Check that the files which the variables ``names`` name can be read.

    Args:
        variables: The variables of the credentials file and of the environment.
        names: The names of the variables.
        is_header: Whether obstore sends the content of the files in an HTTP header.

    Raises:
        UnusableError: A file cannot be read, is not a regular file, or its content is not valid.
    """
    for name in names:
        path = variables.first((name,))
        if path is None:
            continue
        shown = f"{name}: {printable(path)}"
        try:
            content = read_key_file(path)
        except OSError as error:
            msg = f"credentials: {shown}: {error.strerror}"
            raise UnusableError(msg) from error
        except UnusableError as error:
            msg = f"credentials: {shown}: {error}"
            raise UnusableError(msg) from None
        if is_header:
            check_value(shown, content)


def read_key_file(path: str) -> str:
    """Return the text of a file with a key or token.

    Raises:
        OSError: The file cannot be read.
        UnusableError: The file is not a regular file, too long, or not in UTF-8; the message is
            only the reason.
    """

    def open_safely(name: str, flags: int) -> int:
        # Without O_NONBLOCK, open(2) of a FIFO would wait for a writer.
        return os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)

    # With an opener, a failing open() closes the descriptor, also that of a directory.
    with open(path, "rb", opener=open_safely) as file:
        kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
        if kind != stat.S_IFREG:
            msg = f"found {KIND_NAMES.get(kind, 'a special file')}, expected a regular file"
            raise UnusableError(msg)
        content = file.read(_MAX_KEY_FILE_BYTES + 1)
    if len(content) > _MAX_KEY_FILE_BYTES:
        msg = f"found more than {_MAX_KEY_FILE_BYTES} bytes, expected no more"
        raise UnusableError(msg)
    try:
        return content.decode()
    except UnicodeDecodeError:
        msg = "found bytes that are not UTF-8, expected text"
        raise UnusableError(msg) from None


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
