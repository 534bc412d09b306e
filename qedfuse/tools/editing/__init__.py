"""Create or change one image: create, commit, rebase, resize, compact, free list."""
