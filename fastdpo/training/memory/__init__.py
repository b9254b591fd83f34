"""The memory of a run: estimates, plans, and token limits for micro-batches."""
