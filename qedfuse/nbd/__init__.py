"""Exports of NBD servers as files of a chain: the protocol, the connections and the file."""
