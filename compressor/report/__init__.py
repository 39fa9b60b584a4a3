"""What a run found, in forms for people and machines. Knows no torch."""
