"""What happens to model, adapter, reference and optimizer before the first step."""
