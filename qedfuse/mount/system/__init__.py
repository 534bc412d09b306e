"""Mounts as the host sees them: mount table, mountpoints, mount records, unmounting."""
