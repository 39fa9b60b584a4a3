"""Channels, heads and hidden units leave, or single weights become zero; then the model recovers."""
