"""Copying, comparing and measuring whole disks."""
