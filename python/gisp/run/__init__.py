"""A pruning run: the loop, what a step leaves behind, the run folder and the trajectory."""
