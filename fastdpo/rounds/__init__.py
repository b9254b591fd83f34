"""Preference data from a model's own responses: generated, judged, paired."""
