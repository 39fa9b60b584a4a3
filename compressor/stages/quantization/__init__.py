"""Weights and activations become 8-bit integers."""
