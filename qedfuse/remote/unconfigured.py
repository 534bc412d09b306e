"""The client for an object in the cache while the configuration for its server is not valid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qedfuse.errors import RemoteError
from qedfuse.remote.client import RefusedError, UnusableError
from qedfuse.remote.object import make_client
from qedfuse.remote.storevariables import (
    ENDPOINT_VARIABLES,
    Variables,
    find_endpoint,
    find_store_id,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from qedfuse.hostio.hostfile import Buffer
    from qedfuse.remote.address import Address
    from qedfuse.remote.client import Client, ClientOptions, Version


class UnconfiguredClient:
    """Refuses requests until `renew` finds a valid configuration; passes later requests on.

    Attributes:
        failure: The error of `make_client`; raised if the cache does not have the object.
    """

    def __init__(self, address: Address, options: ClientOptions, failure: RemoteError) -> None:
        """Make a client in place of one that `make_client` could not make.

        Args:
            address: The address of the object.
            options: How to connect.
            failure: The error of `make_client`, with an UnusableError as its cause.

        Raises:
            UnusableError: The variables name an endpoint that is invalid or not allowed.
        """
        self.failure = failure
        self._address = address
        self._options = options
        self._reason = str(failure.__cause__)
        self._client: Client | None = None
        self._store_id = ""
        if not address.is_web:
            variables = Variables(dict(options.credentials))
            find_endpoint(variables, ENDPOINT_VARIABLES[address.scheme], options)
            self._store_id = find_store_id(address.scheme, variables)

    @property
    def store_id(self) -> str:
        """The endpoint or account of the store; see `Client.store_id`."""
        return self._store_id

    def head(self) -> Version:
        """Return the object's present version."""
        return self._configured().head()

    def get(
        self,
        offset: int,
        lengths: Sequence[int],
        version: Version,
        allocate: Callable[[int], Buffer] = bytearray,
    ) -> Generator[Buffer]:
        """Yield adjacent parts of a version of the object; see `Client.get`."""
        yield from self._configured().get(offset, lengths, version, allocate)

    def renew(self) -> None:
        """Read the configuration again; if it is valid now, pass later requests on."""
        if self._client is not None:
            self._client.renew()
            return
        try:
            self._client = make_client(self._address, self._options.renewed())
        except UnusableError as error:
            self._reason = str(error)
        except RemoteError as error:
            self._reason = str(error.__cause__)

    def _configured(self) -> Client:
        """Return the client to which requests are passed on.

        Raises:
            RefusedError: The configuration was not valid when it was read last.
        """
        if self._client is None:
            raise RefusedError(self._reason)
        return self._client
