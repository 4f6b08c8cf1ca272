"""A whole pruning run on models of real shape beside the paper's way."""
