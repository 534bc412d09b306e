"""Builds the C extensions; all else is in pyproject.toml.

They are here and not there because pkg-config has to be asked where libfuse is.  All
are optional: without a compiler or libfuse's headers everything else is installed, the
mount works without fallocate(2) and lseek(2), calls that may wait for the host's disk are made
by trio's threads, a check and a map take longer, checksums of a cache take longer, and the
sandbox of a mount lacks Landlock.
"""

from __future__ import annotations

import shlex
import subprocess

from setuptools import Extension, setup

_HIDDEN = ["-fvisibility=hidden"]
"""Hides functions that the files of an extension share.  Otherwise a library with a function of the
same name, loaded earlier with global symbols, would replace them."""


def libfuse(what: str) -> list[str]:
    """Ask pkg-config for flags; without an answer the build fails, which is allowed."""
    try:
        answer = subprocess.run(
            ["pkg-config", what, "fuse3"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return shlex.split(answer.stdout)


setup(
    ext_modules=[
        Extension(
            "qedfuse.mount.fuse._extraops",
            [
                "qedfuse/mount/fuse/_extraops.c",
                "qedfuse/mount/fuse/_dataops.c",
                "qedfuse/mount/fuse/_burst.c",
                "qedfuse/mount/fuse/_cachedread.c",
                "qedfuse/mount/fuse/_inplacewrite.c",
                "qedfuse/mount/fuse/_checkedunits.c",
                "qedfuse/mount/fuse/_counters.c",
                "qedfuse/mount/fuse/_maxread.c",
                "qedfuse/mount/fuse/_pagecache.c",
                "qedfuse/mount/fuse/_queuedread.c",
                "qedfuse/mount/fuse/_readfiles.c",
                "qedfuse/mount/fuse/_readview.c",
                "qedfuse/mount/fuse/_request.c",
                "qedfuse/mount/fuse/_ring.c",
                "qedfuse/mount/fuse/_seek.c",
                "qedfuse/mount/fuse/_splice.c",
                "qedfuse/mount/fuse/_validpages.c",
            ],
            depends=[
                "qedfuse/mount/fuse/_extraops.h",
                "qedfuse/mount/fuse/_readview.h",
                "qedfuse/hostio/_iothreads.h",
            ],
            extra_compile_args=["-std=gnu11", *_HIDDEN, *libfuse("--cflags")],
            extra_link_args=[*libfuse("--libs"), "-ldl"],
            optional=True,
        ),
        Extension(
            "qedfuse.hostio._iothreads",
            [
                "qedfuse/hostio/_iothreads.c",
                "qedfuse/hostio/_iocalls.c",
                "qedfuse/hostio/_iopool.c",
            ],
            depends=[
                "qedfuse/hostio/_iojob.h",
                "qedfuse/hostio/_iopool.h",
                "qedfuse/hostio/_iothreads.h",
            ],
            extra_compile_args=["-std=gnu11", "-O2", "-pthread", *_HIDDEN],
            extra_link_args=["-pthread"],
            optional=True,
        ),
        Extension(
            "qedfuse.mount.sandbox._threads",
            ["qedfuse/mount/sandbox/_threads.c"],
            extra_compile_args=["-std=gnu11", "-O2"],
            optional=True,
        ),
        Extension(
            "qedfuse.remote._crc32",
            ["qedfuse/remote/_crc32.c"],
            extra_compile_args=["-std=gnu11", "-O2"],
            optional=True,
        ),
        Extension(
            "qedfuse.check._sweep",
            ["qedfuse/check/_sweep.c"],
            extra_compile_args=["-std=gnu11", "-O3"],
            optional=True,
        ),
        Extension(
            "qedfuse.tools.inspection._maplines",
            ["qedfuse/tools/inspection/_maplines.c"],
            extra_compile_args=["-std=gnu11", "-O3"],
            optional=True,
        ),
    ]
)
