"""Channels of small magnitude are removed."""
