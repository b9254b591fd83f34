"""From files to packed batches: loading, then formats, tokenization and prepare (with its report), then packing."""
