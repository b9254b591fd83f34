"""The setup of model, adapter, reference and optimizer before the first step."""
