"""Tests that need their own machine: memory pressure, power cuts, partition tables.

They run in a virtual machine, on demand: ``tests/vm/run.sh`` makes and boots it.
"""
