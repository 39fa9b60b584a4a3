"""What a teacher knows and how a student learns it: losses, layers, teachers live and stored, `distil`."""
