"""Ordered write-back of the header and the tables, and the guard before the first write."""
