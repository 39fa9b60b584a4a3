"""Numbers, names and tables as text for people. Knows no torch."""
