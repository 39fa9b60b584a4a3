"""Students learn from teachers, from their peers and from themselves."""
