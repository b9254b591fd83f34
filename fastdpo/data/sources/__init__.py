"""Where rows come from: files and datasets by name, Arrow columns, and the cache of tokenized rows."""
