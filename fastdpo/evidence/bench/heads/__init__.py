"""The head op's benchmark: its problem and fp64 check, its methods, and how they are measured."""
