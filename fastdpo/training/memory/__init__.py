"""How much memory a run takes: estimated, planned for, and kept within by splitting batches."""
