"""What the benchmarks share: measuring, records, plots, tiny models."""
