"""What the mount asks of the kernel and the process beside FUSE."""
