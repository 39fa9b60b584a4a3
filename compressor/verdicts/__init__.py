"""Limits on the numbers of a report, and whether it keeps them. Knows no torch."""
