"""The built-in stages; each stands alone, found through the entry points in pyproject.toml."""
