"""Shared by several tools: formats, pipes, blocks of content, worker threads, opening to write."""
