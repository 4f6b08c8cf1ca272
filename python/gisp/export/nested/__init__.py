"""Nested checkpoints: one set of weights in which every sparsity of a run is a prefix of each matrix."""
