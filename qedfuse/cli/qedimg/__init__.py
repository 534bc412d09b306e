"""The command ``qedimg``: a module for each subcommand, and what they share."""
