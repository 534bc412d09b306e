"""Random mounts, operations, threads, kills and remounts, against a model of the disk."""
