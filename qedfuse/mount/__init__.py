"""Mounting images: options, the FUSE protocol, and one mount from its beginning to its end."""

# Imported first, because the extension must be loaded before any module imports pyfuse3.
from qedfuse.mount.fuse import extraops as extraops
