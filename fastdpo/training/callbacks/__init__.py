"""What a run does around its steps: samples, warnings, model card, summary, logs and predictions."""
