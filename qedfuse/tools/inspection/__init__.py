"""Describing an image without changing it."""
