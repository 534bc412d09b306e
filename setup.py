"""Builds the C extension beside pyfuse3; all else is in pyproject.toml.

It is here and not there because pkg-config has to be asked where libfuse is.  The
extension is optional: without a compiler or libfuse's headers everything else is
installed, and the mount works without fallocate(2) and lseek(2).
"""

from __future__ import annotations

import shlex
import subprocess

from setuptools import Extension, setup


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
            "qedfuse.mount._extraops",
            ["qedfuse/mount/_extraops.c"],
            extra_compile_args=["-std=gnu11", *libfuse("--cflags")],
            extra_link_args=[*libfuse("--libs"), "-ldl"],
            optional=True,
        )
    ]
)
