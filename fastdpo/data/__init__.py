"""From files to packed batches: sources, forms, tokens, batches and rows are its rooms; `prepare` joins them."""
