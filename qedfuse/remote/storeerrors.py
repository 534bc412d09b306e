"""The errors of obstore as exceptions of `qedfuse.remote.client`, each with its reason in one line.

obstore's own texts contain the whole response of the server, and the URL of the request, in which
there may be a secret (a signature of Azure).  So a message has only one of three things: the status
of a response, with its code and its first sentence; the cause of a failed connection; or the last
part of obstore's text, without the secrets of URLs.
"""

from __future__ import annotations

import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from obstore.exceptions import (
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from qedfuse.errors import UsageError
from qedfuse.remote.address import parse_prefix
from qedfuse.remote.client import (
    AttemptError,
    ChangedError,
    MissingError,
    RefusedError,
    UnreachableError,
    UnusableError,
    certificate_message,
)
from qedfuse.remote.urlsyntax import hide_secrets, server_part
from qedfuse.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

ERRORS: Final = (BaseError, FileNotFoundError, ValueError)
"""The exceptions of obstore's functions, except that of a panic (`panics_translated`)."""

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
_STATUS: Final = re.compile(r"non-2xx status code: (\d{3})")
_KEY_REQUEST: Final = re.compile(
    r"Error performing token request"  # Azure, Google
    r"|Error performing POST REDACTED in "  # Amazon's STS; the URL has the token
    r"|Error performing [A-Z]+ \S+/latest/(?:api/token|meta-data/iam/security-credentials/\S*) in "
    r"|Error performing GET http://169\.254\.170\.2/"
    r"|Error getting token response body"
    r"|HTTP error: .* at line \d+ column \d+"  # JSON, which only these services of Amazon send
    r"|Invalid AssumeRoleWithWebIdentity response"
    r"|Failed to read (?:EKS )?token file"  # Amazon
    r"|Error reading federated token file"  # Azure
)
"""The beginning of obstore's text about a request for the key of a role, to the service that gives
such keys (`qedfuse.remote.keyservices`)."""
_GET: Final = re.compile(r"Error performing GET (\S+) in ")
_NO_RANGE: Final = "Received non-partial response when range requested"
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9]{1,80})</Code>")
_NO_BUCKET: Final = re.compile("<Code>(NoSuchBucket|ContainerNotFound)</Code>")
_SENTENCE: Final = re.compile(r"<Message>([^<\n.]{1,200})")
_CAUSES: Final = (
    re.compile(r"InvalidCertificate\(\s*([A-Za-z]+)"),
    re.compile(r'\b(?:message|error): "([^"]{1,200})"'),
    re.compile(r"kind: (Timeout)\b"),
    re.compile(r"source: (TimedOut)\b"),
)
"""Where obstore's debugging output names the cause of a failure; the first match counts."""
_NO_CONNECTION: Final = re.compile(r"client::legacy::Error\(\s*Connect\b")
_TUNNEL: Final = re.compile(r"\bConnect,\s*(Tunnel\w+|ProxyAuthRequired)")
_TUNNEL_REASONS: Final = {
    "TunnelUnsuccessful": "found a refusal to connect to the host",
    "ProxyAuthRequired": "found a demand for a user and a password",
}
"""What a proxy does in place of connecting to a server with TLS, by the name in obstore's debugging
output."""
_NO_PROXY: Final = re.compile(r"client::legacy::Error\(\s*Connect,\s*ConnectFailed\(")
"""What obstore's debugging output contains if a server with TLS is reached by a proxy, and there is
no connection to the proxy.  For a server without TLS the output does not show whose connection has
failed."""
_NO_ADDRESS: Final = "failed to lookup address information: "
_RETRIED: Final = (
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.TOO_EARLY,
    HTTPStatus.TOO_MANY_REQUESTS,
)
_EXPIRED: Final = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
"""Codes with which S3 refuses credentials, although the status is 400."""


@dataclass(frozen=True, slots=True)
class Identity:
    """How requests to a store are signed, as far as messages need to know.

    Attributes:
        hint: How to give credentials; empty if requests have credentials.
        key_url: The URL from which a container gets the key of its role; empty if there is none.
    """

    hint: str = ""
    key_url: str = ""


@contextmanager
def panics_translated() -> Iterator[None]:
    """Replace the exception of a panic inside obstore, in the ``with`` block, by UnusableError."""
    try:
        yield
    except BaseException as error:
        # The exception cannot be imported, and is not a subclass of Exception.
        if type(error).__name__ == "PanicException":
            msg = "found an error inside obstore, expected none (its text is on standard error)"
            raise UnusableError(msg) from None
        raise


@contextmanager
def translating(identity: Identity) -> Iterator[None]:
    """Replace obstore's exceptions in the ``with`` block by those of `qedfuse.remote.client`.

    Args:
        identity: See `Store.identity`.
    """
    try:
        with panics_translated():
            yield
    except ERRORS as error:
        raise translated(error, identity) from error


def translated(error: Exception, identity: Identity | None = None) -> Exception:
    """Return the exception of `qedfuse.remote.client` for an exception of obstore.

    Args:
        error: An instance of one of `ERRORS`.
        identity: How requests are signed; None for a request that is not signed.
    """
    identity = identity or Identity()
    text, _, details = str(error).partition("\n\nDebug source")
    for kind, failure in (
        (PreconditionError, ChangedError()),
        (FileNotFoundError, MissingError("bucket" if _NO_BUCKET.search(text) else "object")),
        (NotSupportedError, UnusableError("found no range in the answer, expected one")),
    ):
        if isinstance(error, kind):
            return failure
    if _NO_RANGE in text:
        # A server has ignored the range.  For this obstore raises no NotSupportedError, which is
        # for kinds of stores without ranges.
        return UnusableError("found no range in the answer, expected one")
    match = _STATUS.search(text)
    if _is_key_request(text, identity.key_url):
        return _for_key_request(match and int(match[1]), text, details)
    if match is not None:
        return _for_status(int(match[1]), text, identity.hint)
    is_refusal = isinstance(error, (PermissionDeniedError, UnauthenticatedError))
    if is_refusal or isinstance(error, ValueError) or "Config error" in text:
        return (RefusedError if is_refusal else UnusableError)(_last_part(text))
    return _for_no_answer(text, details)


def code_of(error: Exception) -> str:
    """Return the code of an S3 server for an error, such as ``NotImplemented``; empty for none."""
    match = _CODE.search(str(error).partition("\n\nDebug source")[0])
    return match[1] if match else ""


def _is_key_request(text: str, key_url: str) -> bool:
    """Return whether obstore's text is about a request for the key of a role.

    Args:
        text: The text.
        key_url: See `Identity`.
    """
    # The body of a response follows after " - ", and is not trusted.
    head = text.partition(" - ")[0]
    url = _GET.search(head)
    is_of_container = bool(key_url and url and _normal(url[1]) == _normal(key_url))
    return is_of_container or _KEY_REQUEST.search(head) is not None


def _normal(url: str) -> tuple[str, str]:
    """Return the server and the rest of a URL in their normal forms; obstore changes both."""
    server = server_part(url)
    rest = unquote(url[len(server) :])
    with suppress(UsageError):
        server = parse_prefix(server).server
    return server, rest if rest.startswith("/") else f"/{rest}"


def _for_key_request(status: int | None, text: str, details: str) -> Exception:
    """Return the exception for a failed request for the key of a role.

    If the response permits no further attempt, the result is a RefusedError, and never an
    UnusableError: after an UnusableError the object could not be read from the cache either.

    Args:
        status: The HTTP status of the response; None if there was no response.
        text: obstore's text.
        details: obstore's debugging output.
    """
    failure = _for_no_answer(text, details) if status is None else _for_status(status, text, "")
    kind = type(failure)
    if status is not None and not isinstance(failure, AttemptError):
        kind = RefusedError
    reason = str(failure) or f"found HTTP status {status}"
    return kind(f"service for credentials: {reason}")


def _for_status(status: int, text: str, hint: str) -> Exception:
    """Return the exception for a response with an HTTP status, and with its body in ``text``."""
    code, sentence = _CODE.search(text), _SENTENCE.search(text)
    msg = f"found HTTP status {status}"
    if code is not None:
        msg += f" ({code[1]}{f': {sentence[1].strip()}' if sentence else ''})"
    msg = printable(msg)
    if status in {401, 403, 407} or (code is not None and code[1] in _EXPIRED):
        return RefusedError(f"{msg} (found no credentials: {hint})" if hint else msg)
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return ChangedError()
    if status in _RETRIED or (
        status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.NOT_IMPLEMENTED
    ):
        return AttemptError(msg)
    if hint:
        # Some stores answer a request without a signature with another status than 401 or 403.
        return RefusedError(f"{msg} (found no credentials: {hint})")
    return UnusableError(msg)


def _for_no_answer(text: str, details: str) -> Exception:
    """Return the exception for a request without a response, from obstore's debugging output."""
    cause = next((found[1] for each in _CAUSES if (found := each.search(details))), None)
    if "InvalidCertificate" in details:
        return UnusableError(certificate_message(f"{cause}"))
    kind = UnreachableError if _NO_CONNECTION.search(details) else AttemptError
    tunnel = _TUNNEL.search(details)
    if tunnel is not None:
        reason = _TUNNEL_REASONS.get(tunnel[1], "found the end of the connection")
        return UnreachableError(f"proxy: {reason}")
    about = "proxy: " if _NO_PROXY.search(details) else ""
    if cause in {"Timeout", "TimedOut"}:
        return kind(f"{about}found no answer in time")
    if cause is None:
        return kind(f"{about}{_last_part(text)}")
    reason = printable(cause)
    if reason.startswith(_NO_ADDRESS):
        reason = reason.removeprefix(_NO_ADDRESS)
        return kind(f"{about}found no address of the host ({reason}), expected one")
    return kind(f"{about}{reason}")


def _last_part(text: str) -> str:
    """Return the last part of obstore's text in one line, without the secrets of URLs in it."""
    line = " ".join(text.rpartition(" - ")[2].split())
    return printable(_URL.sub(lambda url: hide_secrets(url[0]), line)[:300])
