"""Where the bytes of a disk lie: table cache, layers, backing chain; it only reads."""
