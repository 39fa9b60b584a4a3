"""A small student learns from a large teacher."""
