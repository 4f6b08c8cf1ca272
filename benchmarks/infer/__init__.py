"""Inference of pruned models beside the dense one."""
