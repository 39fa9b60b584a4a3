"""From a name in a pipeline file to the object it names."""
