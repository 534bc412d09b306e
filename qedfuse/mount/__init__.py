"""Mounting images: options, the FUSE protocol, and one mount from its beginning to its end."""

# Before anything here imports pyfuse3.
from qedfuse.mount.fuse import extraops as extraops
