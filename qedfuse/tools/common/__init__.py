"""What several tools share: formats, pipes, block comparison, worker threads."""
