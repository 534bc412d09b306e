"""What bad input gets: one line, a documented exit code, and nothing changed."""
