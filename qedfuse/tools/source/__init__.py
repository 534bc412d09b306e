"""Read-only disks: how they store their content, in runs, extents and chunks."""
