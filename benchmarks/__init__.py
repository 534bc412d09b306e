"""Scripts that measure qedfuse beside QEMU; each prints with --help what it measures."""
