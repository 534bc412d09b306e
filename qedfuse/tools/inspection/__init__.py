"""Describing an image without changing it: info, map, dump, free list."""
