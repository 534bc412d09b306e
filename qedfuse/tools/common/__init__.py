"""Helpers of several tools: format detection, pipes, block masks, worker threads, open disks."""
