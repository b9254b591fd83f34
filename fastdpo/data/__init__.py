"""From files to packed batches: loading -> formats -> tokenization -> prepare (with its report) -> packing; synthetic data."""
