"""What pruning removes: channels, heads and hidden units physically, single weights by a zero."""
