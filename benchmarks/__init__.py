"""Scripts that measure, side by side with QEMU; each says how when run with --help."""
