"""A client for object stores, by obstore: S3, Google Cloud Storage and Azure.

obstore hangs in a child process that was forked after its first use, so a client must be made after
the mount has become a daemon.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import obstore
from obstore.exceptions import (
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, S3Store

from qedfuse.remote.address import Address
from qedfuse.remote.client import (
    AttemptError,
    ChangedError,
    MissingError,
    RefusedError,
    UnusableError,
    Version,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ObjectStore

    from qedfuse.remote.client import ClientOptions

_VARIABLES: Final = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
"""How the names of the environment variables begin that configure each kind of store."""
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class StoreClient:
    """Reads one object of an object store."""

    def __init__(self, address: Address, options: ClientOptions) -> None:
        """Read the object at ``address``; nothing is connected yet.

        Raises:
            UnusableError: The environment or the credentials configure no usable store.
        """
        self._address = address
        self._options = options
        self._store = make_store(address, options)

    def head(self) -> Version:
        """Return the object's present version."""
        options: GetOptions = {"head": True}
        return _version(self._get(options).meta)

    def get(self, offset: int, length: int, version: Version) -> memoryview:
        """Return a range of a version of the object; see `Client.get`."""
        options: GetOptions = {"range": (offset, offset + length)}
        if version.etag:
            options["if_match"] = version.etag
        result = self._get(options)
        # The server may have ignored the condition, so its answer is compared as well.
        if not _version(result.meta).is_same(version):
            raise ChangedError
        try:
            content = result.bytes()
        except BaseError as error:
            raise AttemptError(_reason(error)) from error
        if len(content) != length:
            msg = f"found {len(content)} bytes, expected {length}"
            raise AttemptError(msg)
        return memoryview(content)

    def renew(self) -> None:
        """Make the store again, with the credentials that are valid now."""
        self._store = make_store(self._address, self._options)

    def _get(self, options: GetOptions) -> GetResult:
        if self._address.version:
            options["version"] = self._address.version
        try:
            return obstore.get(self._store, self._address.key, options=options)
        except FileNotFoundError as error:
            raise MissingError from error
        except PreconditionError as error:
            raise ChangedError from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise RefusedError(_reason(error)) from error
        except NotSupportedError as error:
            msg = f"found no range in the answer, expected one ({_reason(error)})"
            raise UnusableError(msg) from error
        except BaseError as error:
            raise AttemptError(_reason(error)) from error


def make_store(address: Address, options: ClientOptions) -> ObjectStore:
    """Return obstore's object for the bucket or container of an address.

    Raises:
        UnusableError: The environment or the credentials configure no usable store.
    """
    settings = dict(options.credentials)
    prefix = _VARIABLES[address.scheme]
    config: Any = {
        name.lower(): value for name, value in settings.items() if name.startswith(prefix)
    }
    variables = {**os.environ, **settings}
    common: dict[str, Any] = {
        "client_options": {
            "connect_timeout": timedelta(seconds=options.connect_seconds),
            "timeout": timedelta(seconds=options.attempt_seconds),
            "allow_http": True,
        },
        # `qedfuse.remote.object` repeats attempts, for all clients in the same way.
        "retry_config": {"max_retries": 0},
    }
    try:
        if address.scheme == "gs":
            return GCSStore(address.host, config=config, **common)
        if address.scheme == "az":
            return AzureStore(address.host, config=config, **common)
        if (endpoint := _endpoint(variables, options)) is not None:
            config = {k: v for k, v in config.items() if not k.startswith("aws_endpoint")}
            common["endpoint"] = endpoint
        if "AWS_REGION" not in variables and "AWS_DEFAULT_REGION" not in variables:
            common["region"] = "us-east-1"
        return S3Store(address.host, config=config, **common)
    except (BaseError, ValueError) as error:
        raise UnusableError(_reason(error)) from error


def _endpoint(variables: Mapping[str, str], options: ClientOptions) -> str | None:
    """Return the endpoint of the S3 store; None for Amazon's.

    Raises:
        UnusableError: The endpoint is on another machine and without TLS.
    """
    endpoint = next((variables[name] for name in _ENDPOINTS if variables.get(name)), None)
    if endpoint is None:
        return None
    scheme, _, rest = endpoint.partition("://")
    host = Address(scheme, rest.partition("/")[0].lower(), "")
    if scheme == "http" and not (host.is_loopback or options.allow_http):
        msg = f"found the endpoint {host.shown} without TLS, expected https:// (or allow_http)"
        raise UnusableError(msg)
    return endpoint


def _version(meta: ObjectMeta) -> Version:
    """Return the version that an answer is about."""
    etag = meta["e_tag"] or ""
    if etag.startswith("W/"):  # a weak tag is equal for contents that differ
        etag = ""
    return Version(meta["size"], etag, meta["last_modified"].timestamp())


def _reason(error: Exception) -> str:
    """Return the cause that obstore gives, in one line and without its debugging details."""
    lines = str(error).split("\n\nDebug source")[0].split("\n")
    return " ".join(" ".join(lines).split())
