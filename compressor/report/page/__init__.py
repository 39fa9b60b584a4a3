"""A report as one HTML file with its figures."""
