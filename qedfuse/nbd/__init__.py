"""Exports of NBD servers as files of a chain: the protocol, connections, and the file itself."""
