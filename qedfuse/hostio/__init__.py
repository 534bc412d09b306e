"""The host's files: reading, writing, locking and replacing them."""
