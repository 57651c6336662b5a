"""The rcmstr command, one file a sub-command."""
