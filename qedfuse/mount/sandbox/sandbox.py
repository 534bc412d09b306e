"""The sandbox of a server: what the server is not permitted to do while it answers requests.

While the server answers requests, the images are open already.  So it needs few other files, few
system calls and hardly any capability.  The sandbox forbids everything else.

The rules of paths are prepared before the mount exists, because making such a rule looks up the
path.  Later, a path could lead through the mount.  Then the server would wait for its own reply.
Later only two kinds of rules are added: those of open descriptors, which need no path, and that of
the mountpoint, because opening it with O_PATH sends the server no request.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final, Literal, TypeVarTuple
from urllib.parse import urlsplit

from qedfuse.errors import HostError
from qedfuse.mount.sandbox import allowedfiles, privileges
from qedfuse.mount.sandbox.seccomp import CallFilter, CallNeeds
from qedfuse.util.landlock import (
    NETWORK_VERSION,
    REMOVE_FILE,
    SCOPE_ABSTRACT_SOCKETS,
    Ruleset,
    landlock_version,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from qedfuse.mount.sandbox.needs import ServerNeeds
    from qedfuse.remote.address import Address

Args = TypeVarTuple("Args")

SandboxMode = Literal["on", "off", "strict"]
"""The values of the option ``sandbox``."""

_MIN_LANDLOCK_VERSION: Final = 2
"""The lowest usable version of Landlock.  Version 1 cannot permit the cache for remote files to
rename files into another directory."""
_DEFAULT_PORTS: Final = (53, 80, 443)
"""The TCP ports to which a server that reads remote files may always connect.  They are the usual
ports of name servers, stores and services for credentials."""
_ADDRESS_VARIABLE_PREFIXES: Final = (
    *("AWS_", "AZURE_", "GOOGLE_"),
    *("IDENTITY_ENDPOINT", "AZURITE_BLOB_STORAGE_URL"),
)
"""Prefixes of environment variables whose values can be the URL of a store or of a service for
credentials."""


class Sandbox:
    """A sandbox that is prepared by the constructor, and entered once.

    Attributes:
        mode: The value of the option ``sandbox``.
        in_force: The parts that are in force, in words for users; empty before `enter`.
        missing: The parts that cannot be put into force, each with the reason.
    """

    def __init__(self, mode: SandboxMode, needs: ServerNeeds) -> None:
        """Make the rules and the filter of system calls; nothing is in force yet.

        Raises:
            HostError: The mode is ``strict``, and a part of the sandbox is not available.
        """
        self.mode = mode
        self.in_force: list[str] = []
        self.missing: list[str] = []
        self._is_strict = mode == "strict"
        # Whether the server needs CAP_DAC_OVERRIDE to remove a file when it ends.
        self._overrides_directory = needs.socket_directory is not None and (
            privileges.removing_needs_override(needs.socket_directory)
        )
        self._needs = needs
        self._rules: Ruleset | None = None
        self._filter: CallFilter | None = None
        self._restrict = privileges.thread_restrictor()
        if self._restrict is None:
            self._add_missing("Landlock", "the extension was not built, or cannot be used")
        else:
            self._rules = self._try_make_rules()
        try:
            self._filter = CallFilter(
                CallNeeds(
                    network=needs.uses_servers,
                    # `qedfuse.nbd.connecting` is loaded only if an image or backing file is on an
                    # NBD server, which may be a qemu-nbd that this server has started.
                    host="qedfuse.nbd.connecting" in sys.modules,
                    # `qedfuse.foreign.process` is loaded only if this server has started a
                    # qemu-nbd.
                    kill="qedfuse.foreign.process" in sys.modules,
                    modes=needs.modes,
                    log=self._is_strict,
                )
            )
        except OSError as error:
            self._add_missing("seccomp", str(error.strerror))

    def _try_make_rules(self) -> Ruleset | None:
        """Return the ruleset; if Landlock cannot be used, add that to ``missing``, return None."""
        version = landlock_version()
        if version == 0:
            self._add_missing("Landlock", "the kernel or a filter of system calls refuses it")
        elif version < _MIN_LANDLOCK_VERSION:
            self._add_missing(
                "Landlock", f"found version {version}, expected {_MIN_LANDLOCK_VERSION}"
            )
        elif self._is_strict and version < NETWORK_VERSION:
            self._add_missing(
                "Landlock for TCP", f"found version {version}, expected {NETWORK_VERSION}"
            )
        else:
            try:
                return self._make_rules(version)
            except OSError as error:
                self._add_missing("Landlock", str(error.strerror))
        return None

    def _make_rules(self, version: int) -> Ruleset:
        """Return the ruleset, to which `enter` later adds the mount and some open files."""
        # Signals to qemu-nbd must stay possible, so `SCOPE_SIGNALS` is left out.  The filter of
        # system calls restricts signals instead.
        rules = Ruleset(version, SCOPE_ABSTRACT_SOCKETS)
        try:
            self._add_paths_and_ports(rules)
        except BaseException:
            rules.close()
            raise
        return rules

    def _add_paths_and_ports(self, rules: Ruleset) -> None:
        """Add the rules that are known before the mount exists."""
        needs = self._needs
        for path, rights in allowedfiles.system_files():
            rules.try_allow_path(path, rights)
        if needs.socket_directory is not None:
            rules.allow(needs.socket_directory, REMOVE_FILE)
        if needs.uses_servers:
            for path, rights in allowedfiles.network_files(needs.variables):
                rules.try_allow_path(path, rights)
            for path, rights in allowedfiles.key_directories(needs.key_files):
                rules.try_allow_path(path, rights)
            for port in _ports(needs.addresses, needs.variables):
                rules.allow_connect(port)
            if needs.cache_directory is not None:
                rules.try_allow_path(needs.cache_directory, allowedfiles.CHANGE_TREE)

    def _add_missing(self, what: str, reason: str) -> None:
        """Add the part ``what`` to ``missing``, or raise a HostError if the mode is ``strict``."""
        if self._is_strict:
            msg = (
                f"option sandbox=strict: {what}: {reason} "
                "(with sandbox=on the mount starts without it)"
            )
            raise HostError(msg)
        self.missing.append(f"{what} ({reason})")

    def __str__(self) -> str:
        """Return what is in force and what is missing, in one line for the log."""
        missing = f"; without {', '.join(self.missing)}" if self.missing else ""
        return f"{self.mode}: {', '.join(self.in_force) or 'nothing'}{missing}"

    def enter(self, files: Iterable[tuple[int, int]]) -> None:
        """Put the sandbox into force in all threads, and set ``in_force``.

        Args:
            files: Descriptors of files to add to the rules, each with the rights that the server
                keeps.

        Raises:
            HostError: The mode is ``strict``, and the kernel refused something.
        """
        parts = []
        try:
            privileges.make_undumpable()
            parts.append("not dumpable")
        except OSError as error:
            self._add_missing("not dumpable", str(error.strerror))
        self._allow(self._allow_mountpoint)
        for fd, rights in files:
            self._allow(Ruleset.allow, fd, rights)
            if rights & REMOVE_FILE and privileges.removing_needs_override(fd):
                self._overrides_directory = True
        self.in_force = [*self._restrict_threads(), *self._load_filter(), *parts]

    def _allow(self, allow: Callable[[Ruleset, *Args], None], *args: *Args) -> None:
        """Call ``allow`` with the ruleset and ``args``; if that fails, do without Landlock."""
        if self._rules is None:
            return
        try:
            allow(self._rules, *args)
        except OSError as error:
            self._add_missing("Landlock", str(error.strerror))
            self._rules.close()
            self._rules = None

    def _allow_mountpoint(self, rules: Ruleset) -> None:
        """Add the mount itself to the ruleset."""
        # fstat(2) cannot find out whether the mountpoint is a directory, because the call would
        # wait for this server itself.
        rights = allowedfiles.SERVE if self._needs.is_directory else allowedfiles.SERVE_FILE
        mountpoint = os.open(self._needs.mountpoint, os.O_PATH | os.O_CLOEXEC)
        try:
            rules.allow(mountpoint, rights)
        finally:
            os.close(mountpoint)

    def _restrict_threads(self) -> list[str]:
        """Restrict all threads by the rules, and drop capabilities; return what is in force."""
        if self._restrict is None:
            return []
        rules, capabilities = self._rules, self._kept_capabilities()
        try:
            self._restrict(rules, capabilities)
        except OSError as error:
            # Without a ruleset, Landlock is in ``missing`` already, with the reason.
            self._add_missing(
                "no new privileges" if rules is None else "Landlock", str(error.strerror)
            )
            return []
        finally:
            if rules is not None:
                rules.close()
        parts = ["no new privileges"]
        if rules is not None:
            parts.insert(0, f"Landlock {rules.version}")
        if privileges.may_have_capabilities():
            names = privileges.capability_names(capabilities)
            parts.append(f"capabilities {' '.join(names) or 'none'}")
        return parts

    def _load_filter(self) -> list[str]:
        """Put the filter of system calls into force; return what is in force."""
        if self._filter is None:
            return []
        try:
            self._filter.load()
        except OSError as error:
            self._add_missing("seccomp", str(error.strerror))
            return []
        return [f"seccomp ({self._filter.count} system calls)"]

    def _kept_capabilities(self) -> int:
        """Return the set of the capabilities that root needs to serve this mount, one bit each.

        The mountpoint and the pid file may lie in a directory of another user.  Root can search it
        only with CAP_DAC_READ_SEARCH, and remove a file from it only with CAP_DAC_OVERRIDE.  To
        correct the sizes that the kernel has cached, the server truncates files of the mount or
        sets their permissions (`qedfuse.mount.fuse.sizefixup`).  Another user may own these files,
        so the server needs CAP_DAC_OVERRIDE and CAP_FOWNER.
        """
        kept = 1 << privileges.CAP_DAC_READ_SEARCH
        if self._needs.writable:
            kept |= 1 << privileges.CAP_DAC_OVERRIDE | 1 << privileges.CAP_FOWNER
        if self._overrides_directory:
            kept |= 1 << privileges.CAP_DAC_OVERRIDE
        return kept


def _ports(addresses: Iterable[Address], variables: Iterable[tuple[str, str]]) -> set[int]:
    """Return the TCP ports to which a server that reads remote files may connect."""
    ports = set(_DEFAULT_PORTS)
    ports.update(address.port for address in addresses if address.port is not None)
    for name, value in variables:
        is_host = name.lower().endswith("_proxy") or name.startswith("GCE_METADATA_")
        if "://" not in value and is_host:
            value = f"http://{value}"  # noqa: PLW2901  as obstore and urllib3 read it
        if "://" in value and (is_host or name.startswith(_ADDRESS_VARIABLE_PREFIXES)):
            try:
                port = urlsplit(value).port
            except ValueError:  # no URL
                continue
            if port is not None:
                ports.add(port)
    return ports
