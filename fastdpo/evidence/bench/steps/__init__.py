"""The training step's benchmark: its workloads and methods, the process that runs them, and their tables."""
