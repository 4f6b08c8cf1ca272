"""Removing structures in place: what of a layer goes, where it moves to, and how it comes back."""
