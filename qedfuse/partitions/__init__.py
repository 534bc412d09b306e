"""Parsers of partition tables; the caller passes the function that reads the disk."""
