"""What a crash at any moment leaves, state by state."""
