"""Rows of messages: from messages to the text that the chat template renders, and from its tokens to sequences and
masks."""
