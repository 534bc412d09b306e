"""The variables that name proxies, of which values that a client could ignore are refused.

There are two clients: obstore, the library for object stores, and `WebClient`, for web servers,
which uses Python's rules.  obstore ignores a value that is not a URL, and connects directly.  It
prefers a name in upper case, even with an empty value; Python prefers the name in lower case.
"""

from __future__ import annotations

import os
import re
from typing import Final

from qedfuse.remote.client import UnusableError

_PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy")
_EXCLUDED: Final = "no_proxy"
_CGI: Final = "REQUEST_METHOD"
"""A variable that a web server sets for the programs that it starts (CGI).  A request can set
``HTTP_PROXY`` in such a program.  So obstore then ignores all proxies, and Python ignores the one
of ``HTTP_PROXY``."""
_MAX_PORT: Final = 65535
_USER_PART: Final = r"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})"
_URL: Final = re.compile(
    r"(?:https?://)?"
    rf"(?:{_USER_PART}+:{_USER_PART}*@)?"
    r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])"
    r"(?::([0-9]{1,5}))?/?",
    re.IGNORECASE | re.ASCII,
)


def check_proxies() -> None:
    """Check that both clients use the proxies of the environment, and use them alike.

    Raises:
        UnusableError: A value is not the URL of a proxy, a name is in mixed case, the values of a
            name in upper and in lower case differ, or ``REQUEST_METHOD`` is set beside a proxy.
    """
    for variable in (*_PROXIES, _EXCLUDED):
        found = {name: os.environ[name] for name in os.environ if name.lower() == variable}
        # obstore ignores a name in mixed case; Python does not.
        is_mixed = any(not (name.islower() or name.isupper()) for name in found)
        if is_mixed or len(set(found.values())) > 1:
            msg = (
                f"proxy: found {' and '.join(sorted(found))} in the environment, expected "
                f"{variable.upper()} or {variable}, or both with one value"
            )
            raise UnusableError(msg)
        if variable == _EXCLUDED:
            continue
        is_needed = variable != "all_proxy" or not all(map(_is_set, ("http_proxy", "https_proxy")))
        for name, value in found.items():
            if not (value and is_needed):
                continue
            if not _is_url(value):
                # The message does not have the value, which may contain a password.
                msg = (
                    f"proxy: found {name} in the environment that is not a usable URL, expected "
                    "http://HOST:PORT"
                )
                raise UnusableError(msg)
            if _CGI in os.environ:
                msg = (
                    f"proxy: found {_CGI} beside {name} in the environment, expected only one of "
                    f"them, because with {_CGI} clients ignore proxies"
                )
                raise UnusableError(msg)


def with_scheme(proxy: str) -> str:
    """Return the URL of a proxy for a value that `check_proxies` accepts."""
    return proxy if "://" in proxy else f"http://{proxy}"


def _is_set(variable: str) -> bool:
    """Return whether a variable has a value in upper or in lower case."""
    return bool(os.environ.get(variable) or os.environ.get(variable.upper()))


def _is_url(value: str) -> bool:
    """Return whether both clients take a value, with `with_scheme`, as the URL of a proxy."""
    match = _URL.fullmatch(value)
    return match is not None and 0 < int(match[1] or "1") <= _MAX_PORT
