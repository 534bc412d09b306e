"""A fuzzer of mounts: random operations, threads, kills and remounts, compared with a model."""
