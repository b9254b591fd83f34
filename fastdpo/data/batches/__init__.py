"""Which tokenized groups run together, and how they are laid out as one batch."""
