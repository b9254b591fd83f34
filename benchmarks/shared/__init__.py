"""What the benchmarks share: plots, tiny models, models in fp64."""
