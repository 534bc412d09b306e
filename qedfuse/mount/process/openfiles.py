"""Raising the limit on open files (RLIMIT_NOFILE), and explaining errors caused by the limit."""

from __future__ import annotations

import errno
import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from qedfuse.errors import HostError, QedError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_OTHER_FILES: Final = 32
"""Maximum number of open files besides images and their backing files."""

_REMEDY: Final = "(see: ulimit -Hn; for a service: LimitNOFILE=)"


def raise_open_file_limit() -> None:
    """Raise the soft limit on open files to the hard limit; a refusal by the kernel is ignored."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # the sysctl fs.nr_open was lowered below the hard limit
        return


@contextmanager
def explained_limit(images: int) -> Iterator[None]:
    """Check the limit on open files before the block, and explain an error that it causes there.

    Args:
        images: The number of images that the block opens, not counting their backing files.

    Raises:
        HostError: The limit is too low for the images, or a `QedError` of the block was caused by
            EMFILE.  The message has the limit, and how many open files are needed.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = images + MAX_OTHER_FILES
    if limit != resource.RLIM_INFINITY and needed > limit:
        msg = f"{images} images: found a limit of {limit} open files, expected {needed} {_REMEDY}"
        raise HostError(msg, errno.EMFILE)
    try:
        yield
    except QedError as error:
        if not _is_caused_by_limit(error):
            raise
        msg = (
            f"{error}: found a limit of {limit} open files, expected more than {needed} for "
            f"{images} images and their backing files {_REMEDY}"
        )
        raise HostError(msg, errno.EMFILE) from error


def _is_caused_by_limit(error: BaseException | None) -> bool:
    """Return whether an exception, or one of its causes, is an OSError with EMFILE."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            return True
        error = error.__cause__
    return False
