"""Partition tables of a disk: bytes to values, without any I/O of their own."""
