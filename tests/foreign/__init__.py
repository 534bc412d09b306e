"""Images in QEMU's other formats."""
