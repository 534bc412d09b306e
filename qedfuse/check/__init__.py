"""Checking an image: what its tables refer to, what is wrong, and how to mend it."""
