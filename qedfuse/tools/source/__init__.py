"""A disk that is only read, and the order in which it is read."""
