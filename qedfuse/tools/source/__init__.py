"""Disks that are only read: how they store their content, as runs, extents and chunks."""
