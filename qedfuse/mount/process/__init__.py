"""The serving process: background, signals, logs, announcements, limits and memory."""
