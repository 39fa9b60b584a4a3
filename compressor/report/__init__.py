"""What a run found: records, and their forms for people and machines. Knows no torch."""
