"""Commands on a mount that another process serves."""
