"""The mount: one session between images, the kernel and the user."""
