"""Sources of rows: files and datasets by name, Arrow columns, and the cache of tokenized rows."""
