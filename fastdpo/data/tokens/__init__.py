"""From one row's text or messages to the token ids of a prompt and its responses."""
