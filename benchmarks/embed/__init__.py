"""Scores inside somebody else's backward pass, beside the ways peers take them."""
