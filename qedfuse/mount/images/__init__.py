"""Which images a mount shows, under which names, and how they are opened."""
