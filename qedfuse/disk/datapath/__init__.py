"""Guest requests: the fast path, the write path and discard."""
