"""The `compress` command: what it takes, does and prints."""
