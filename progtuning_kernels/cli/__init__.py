"""The `progtuning` command."""
