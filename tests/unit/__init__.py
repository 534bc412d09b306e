"""One module at a time, without QEMU and without a mount."""
