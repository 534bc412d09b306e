"""Images in QEMU's other formats, served by qemu-nbd and read as raw disks."""
