"""The toolbox, command by command."""
