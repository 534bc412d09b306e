"""Bad input: one line, a documented exit code, and nothing changed."""
