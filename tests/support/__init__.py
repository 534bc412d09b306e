"""Shared by the tests: models, test doubles, and wrappers of QEMU and of real mounts."""
