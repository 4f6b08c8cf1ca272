"""Benchmarks of a source checkout: kernels, a whole pruning run, and the quality of what it leaves."""
