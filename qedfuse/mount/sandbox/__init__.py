"""Giving up what a server does not need: files, network, system calls, capabilities."""
