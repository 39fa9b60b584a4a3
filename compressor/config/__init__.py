"""From a YAML file to typed settings; every problem is found at once, with its file, line and column."""
