"""The commands ``qedfuse`` and ``qedimg``: arguments in, text and exit codes out."""
