"""Tests that need a machine of their own: memory pressure, power cuts, partition tables.

They run in a virtual machine, on demand: ``tests/vm/run.sh`` makes and boots it.
"""
