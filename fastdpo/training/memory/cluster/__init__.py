"""Plans past one GPU: what every process holds and sends, and how long a step takes."""
