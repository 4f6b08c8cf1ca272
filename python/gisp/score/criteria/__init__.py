"""Criteria other than gradients: scores of structures from weights, activations or training."""
