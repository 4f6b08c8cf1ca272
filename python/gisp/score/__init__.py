"""Criteria: where the scores of a step come from."""
