"""Tests against the real QEMU, in both directions."""
