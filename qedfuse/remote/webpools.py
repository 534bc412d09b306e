"""The connection pools of a client for web servers.

The connections are direct or lead through proxies.  The usual variables of the environment
(``https_proxy``, ``http_proxy``, ``all_proxy``, ``no_proxy``) configure the proxies.  obstore, the
library for object stores, reads the same variables; `qedfuse.remote.proxies` refuses values that
the two would not read alike.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final
from urllib.request import getproxies, proxy_bypass

from urllib3.exceptions import HTTPError

from qedfuse.remote.client import UnusableError
from qedfuse.remote.deadline import make_pool
from qedfuse.remote.proxies import check_proxies, with_scheme

if TYPE_CHECKING:
    import urllib3

    from qedfuse.remote.address import Address

_MAX_KEPT_CONNECTIONS: Final = 16
"""Maximum number of connections that are kept for each host."""


class WebPools:
    """Chooses the connection pool for a request.  Threads may use the object concurrently."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[tuple[str, str], urllib3.PoolManager] = {}

    def pool_for(self, target: Address) -> urllib3.PoolManager:
        """Return the pool for an address; each scheme and host has its own pool.

        The pool connects through the proxy that the environment names for the scheme, or else
        through the one for all schemes.
        The pool connects directly if the environment names no proxy, if ``no_proxy`` excludes the
        host, or if the host is this machine.

        Raises:
            UnusableError: The proxies of the environment cannot be used; see `check_proxies`.
        """
        with self._lock:
            pool = self._pools.get((target.scheme, target.host))
            if pool is None:
                pool = self._pools[target.scheme, target.host] = _make_pool(target)
            return pool


def _make_pool(target: Address) -> urllib3.PoolManager:
    """Return a new pool for an address."""
    if target.is_loopback:
        return make_pool(None, _MAX_KEPT_CONNECTIONS)
    check_proxies()
    proxies = {} if proxy_bypass(target.host) else getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    try:
        return make_pool(with_scheme(proxy) if proxy else None, _MAX_KEPT_CONNECTIONS)
    except (HTTPError, ValueError) as error:  # for example a character that is not in Latin-1
        # The message does not have the URL, which may contain a password.
        msg = "proxy: found a URL in the environment that is not usable, expected another one"
        raise UnusableError(msg) from error
