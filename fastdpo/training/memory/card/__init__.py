"""Plans for one GPU: settings, the longest pair of each, and seconds of a step."""
