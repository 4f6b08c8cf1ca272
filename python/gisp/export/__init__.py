"""Exports: pruned checkpoints that load in other programs, checked against the masked model before they appear."""
