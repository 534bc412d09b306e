"""Check an image, repair it with a backup, and undo a repair."""
