"""Checking an image, repairing it with a backup, and undoing a repair."""
