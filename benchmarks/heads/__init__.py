"""The head op's benchmark: its problems, and who solves them."""
