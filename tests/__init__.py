"""Tests, by what they need: nothing, a crash, QEMU, a mount."""
