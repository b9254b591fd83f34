"""Rewards that models give to responses: log-probs, implicit rewards of DPO checkpoints, accuracy on pairs."""
