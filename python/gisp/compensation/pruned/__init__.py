"""The pruned model inside the dense one, which every method measures and some differentiate."""
