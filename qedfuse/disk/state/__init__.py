"""What the header states about the image: NEED_CHECK, the free list, the backing file name."""
