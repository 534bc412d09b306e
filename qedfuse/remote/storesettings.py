"""A bucket or container of an object store, configured by variables.

obstore itself reads the environment.  This module adds the variables of the credentials file, and
refuses an endpoint without TLS that the user has not allowed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from qedfuse.remote.client import UnusableError
from qedfuse.remote.keyservices import is_cloud_machine, is_of_cloud
from qedfuse.remote.proxies import check_proxies
from qedfuse.remote.storeerrors import Identity, panics_translated, translated
from qedfuse.remote.storeidentity import add_azure_identity, add_google_identity, add_s3_identity
from qedfuse.remote.storevariables import (
    AZURE_SERVICE_VARIABLES,
    CONTAINER_VARIABLES,
    ENDPOINT_VARIABLES,
    KEY_VARIABLES,
    PREFIXES,
    REGION_VARIABLES,
    SKIP_VARIABLES,
    Variables,
    check_variables,
    find_endpoint,
    find_store_id,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from qedfuse.remote.address import Address
    from qedfuse.remote.client import ClientOptions

_MAX_RETRIES: Final = 10_000
"""How often obstore may repeat a request; so often that only ``retry_seconds`` limits it."""
_MAX_PAUSE_SECONDS: Final = 5.0
"""Maximum pause between two attempts of obstore."""
_UNKNOWN_TO_OBSTORE: Final = (
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_EC2_METADATA_DISABLED",
)
"""Variables that are not passed to obstore, because obstore does not know them."""
_HINTS: Final = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


class _ForkGuard:
    """Notices that the parent process used a store before this process was forked.

    obstore's threads do not exist in such a child, so a request would never end.
    """

    def __init__(self) -> None:
        self._is_used = False
        self._is_broken = False
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self._is_broken |= self._is_used

    def use(self) -> None:
        """Note that this process uses a store.

        Raises:
            UnusableError: The parent process used one before the fork.
        """
        if self._is_broken:
            msg = (
                "found a process that was forked after its parent had used a store, expected the "
                "fork before the first use of a store, or a new program (start method spawn)"
            )
            raise UnusableError(msg)
        self._is_used = True


_GUARD: Final = _ForkGuard()


@dataclass(frozen=True, slots=True)
class Store:
    """A configured bucket or container.

    Attributes:
        handle: The store as an object of obstore.
        identity: How requests are signed, for messages.
        store_id: The endpoint or account that has the bucket; see `find_store_id`.
    """

    handle: ObjectStore
    identity: Identity
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
        UnusableError: The variables, or a file with credentials, configure no usable store, or a
            proxy of the environment cannot be used, or the process was forked after its parent had
            used a store.
    """
    _GUARD.use()
    # Asked before anything can be refused: the answer is cached, and a sandbox could hide it later.
    is_cloud_machine(address.scheme)
    check_proxies()
    variables = Variables(dict(options.credentials))
    check_variables(address.scheme, variables)
    prefix = PREFIXES[address.scheme]
    handled_here = (
        *KEY_VARIABLES,
        *ENDPOINT_VARIABLES["s3"],
        *REGION_VARIABLES,
        *AZURE_SERVICE_VARIABLES,
        *SKIP_VARIABLES.values(),
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
        # For reads `retry_seconds` is 0, because `qedfuse.remote.object` repeats them.
        "retry_config": {
            "max_retries": _MAX_RETRIES if retry_seconds else 0,
            "retry_timeout": timedelta(seconds=retry_seconds),
            "backoff": {"max_backoff": timedelta(seconds=_MAX_PAUSE_SECONDS)},
        },
    }
    endpoint = find_endpoint(variables, ENDPOINT_VARIABLES[address.scheme], options)
    is_own = is_of_cloud(address.scheme, endpoint)
    common["client_options"]["allow_http"] = bool(endpoint and endpoint.startswith("http://"))
    try:
        with panics_translated():
            if address.scheme == "s3":
                if endpoint is not None:
                    # obstore prefers this name to all others.
                    common["aws_endpoint_url_s3"] = endpoint
                common["region"] = variables.first(REGION_VARIABLES) or "us-east-1"
                has_credentials = add_s3_identity(
                    variables,
                    common,
                    is_amazon=is_own,
                    allow_http=options.allow_http,
                    renewed=options.renewed if read_keys_again else None,
                )
                handle: ObjectStore = S3Store(address.host, config=config, **common)
            elif address.scheme == "gs":
                has_credentials = add_google_identity(
                    variables, common, is_google=is_own, allow_http=options.allow_http
                )
                handle = GCSStore(address.host, config=config, **common)
            else:
                has_credentials = add_azure_identity(
                    variables, common, is_azure=is_own, allow_http=options.allow_http
                )
                handle = AzureStore(address.host, config=config, **common)
    except (BaseError, ValueError) as error:
        raise UnusableError(str(translated(error))) from error
    hint = "" if has_credentials else _HINTS[address.scheme]
    key_url = variables.first((CONTAINER_VARIABLES[1],)) or ""
    return Store(handle, Identity(hint, key_url), find_store_id(address.scheme, variables))
