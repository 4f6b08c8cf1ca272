"""The pruned model inside the dense one, which every stage measures and some differentiate."""
