"""QED disk images as flat raw files."""

__version__ = "0.1.0"
