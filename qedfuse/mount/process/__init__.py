"""The serving process: background, logs, readiness."""
