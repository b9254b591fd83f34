"""From files to packed batches: the subpackages sources, forms, tokens, batches and rows, joined by `prepare`."""
