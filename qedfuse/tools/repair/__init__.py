"""Checking the image at a path, repairing it, and undoing a repair."""
