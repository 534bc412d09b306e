"""The FUSE protocol: requests of the kernel answered from a disk."""
