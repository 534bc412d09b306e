"""What several tools share: format detection, pipes, block masks, worker threads, open disks."""
