"""Against the real QEMU, in both directions."""
