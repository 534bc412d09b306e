"""Ordered write-back of the header and the tables."""
