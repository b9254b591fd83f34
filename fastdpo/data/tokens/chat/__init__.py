"""Rows of messages: from what people say to the text that a chat template writes of it, and from its tokens to
sequences and masks."""
