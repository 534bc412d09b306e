"""The command ``qedfuse``, which mount(8) runs by the name ``mount.qedfuse``."""
