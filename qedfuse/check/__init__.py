"""The check of an image and its repair."""
