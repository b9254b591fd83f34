"""Rows of messages: from messages to rendered text, and from its tokens to sequences and masks."""
