"""Mounting images: options, the FUSE protocol, and one mount from its beginning to its end."""

# This import must stay the first one, because the extension must be loaded before any module
# imports pyfuse3.
from qedfuse.mount.fuse import extraops as extraops
