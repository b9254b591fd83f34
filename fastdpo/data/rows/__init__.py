"""Rows of a dataset as token columns, what was said of them, and the first of them checked."""
