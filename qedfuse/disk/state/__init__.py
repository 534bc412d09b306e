"""What the header says about the tables: NEED_CHECK and the persistent free list."""
