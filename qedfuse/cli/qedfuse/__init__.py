"""The command ``qedfuse``, which mount(8) also runs as its helper ``mount.qedfuse``."""
