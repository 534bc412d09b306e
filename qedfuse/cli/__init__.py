"""The commands: words in, exit codes and text out."""
