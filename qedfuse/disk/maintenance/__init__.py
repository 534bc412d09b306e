"""Work on a whole open image: resizing and compaction."""
