"""What a copy is written to."""
