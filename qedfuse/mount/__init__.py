"""The mount: one session between images, the kernel and the user."""

# Before anything here imports pyfuse3.
from qedfuse.mount.fuse import extraops as extraops
