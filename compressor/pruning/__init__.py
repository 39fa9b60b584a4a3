"""Which weights and channels a model can do without, and how many at each step."""
