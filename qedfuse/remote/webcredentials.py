"""Credentials for web servers: a user with a password, or a token, for one host.

The credentials come only from a credentials file, and only the host that the file names gets them.
So neither a URL in an image nor a redirection makes the client send them to another host.
"""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from qedfuse.errors import UsageError
from qedfuse.remote.address import parse_prefix
from qedfuse.remote.client import UnusableError

if TYPE_CHECKING:
    from qedfuse.remote.address import Address

_HOST: Final = "WEB_HOST"
_USER: Final = "WEB_USER"
_PASSWORD: Final = "WEB_PASSWORD"  # noqa: S105  the name of a variable
_TOKEN: Final = "WEB_TOKEN"  # noqa: S105  the name of a variable
_VALID_TOKEN: Final = re.compile(r"[\x21-\x7e]+")
HINT: Final = f"a file given with credentials: {_HOST}, {_USER} and {_PASSWORD}, or {_TOKEN}"
"""How to give credentials, for messages."""


class WebCredentials:
    """The header ``Authorization`` for the requests to one host."""

    def __init__(self, variables: tuple[tuple[str, str], ...]) -> None:
        """Use the variables of a credentials file; variables for object stores are ignored.

        Raises:
            UnusableError: Only some of the necessary variables are given, a variable is not valid,
                or the variables contradict each other.
        """
        given = {name: value for name, value in variables if value}
        self._host = ""
        self._header = ""
        if not {_HOST, _USER, _PASSWORD, _TOKEN} & given.keys():
            return
        self._host = _parse_host(given.get(_HOST, ""))
        user, password, token = (given.get(name, "") for name in (_USER, _PASSWORD, _TOKEN))
        if token and not (user or password):
            if not _VALID_TOKEN.fullmatch(token):
                raise _invalid(_TOKEN, "a character that no token has", "none")
            self._header = f"Bearer {token}"
        elif user and password and not token:
            if ":" in user:
                raise _invalid(_USER, "a colon", "none")
            self._header = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
        else:
            found = ", ".join(name for name in (_USER, _PASSWORD, _TOKEN) if given.get(name))
            expected = f"{_USER} and {_PASSWORD}, or {_TOKEN}"
            raise _invalid(_HOST, f"{found or 'nothing'} beside it", expected)

    def headers_for(self, target: Address) -> dict[str, str]:
        """Return the headers for a request to ``target``; empty for another host.

        Empty also if the request would reach another machine without TLS.
        """
        is_secure = target.scheme == "https" or target.is_loopback
        if self._header and target.host == self._host and is_secure:
            return {"Authorization": self._header}
        return {}


def _parse_host(text: str) -> str:
    """Return the value of ``WEB_HOST`` in the form of `Address.host`."""
    if not text:
        raise _invalid(_HOST, "none", "the host to which the credentials are sent")
    address = None
    with suppress(UsageError):
        address = parse_prefix(text if "://" in text else f"https://{text}")
    if address is None or not address.is_web or address.path:
        raise _invalid(_HOST, "no valid host", "HOST or HOST:PORT")
    return address.host


def _invalid(variable: str, found: str, expected: str) -> UnusableError:
    return UnusableError(f"credentials: {variable}: found {found}, expected {expected}")
