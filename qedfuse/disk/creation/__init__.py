"""New, empty images."""
