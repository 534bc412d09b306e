"""Lookup: how the disk is stored in the files of its chain; reads tables and data only."""
