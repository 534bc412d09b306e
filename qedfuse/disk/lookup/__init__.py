"""Lookup: opening the files of a chain, and finding in which of them each range is stored."""
