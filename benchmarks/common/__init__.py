"""What all benchmarks share: shapes, measuring, goals, plots, the command line."""
