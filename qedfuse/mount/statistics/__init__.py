"""Statistics of a mount that is being served: collecting them, and serving them to programs."""
