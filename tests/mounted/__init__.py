"""Tests with a real kernel mount."""
