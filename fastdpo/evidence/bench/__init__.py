"""`fastdpo bench`: time and memory of the head op and of whole training steps, on the user's machine."""
