"""Free clusters: allocation, deferred reuse, reclamation, and the scan that finds them."""
