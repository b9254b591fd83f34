"""Rows of a dataset as token columns, the report about them, and the check of the first row."""
