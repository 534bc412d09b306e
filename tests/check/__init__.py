"""Tests of the checker and of repair."""
