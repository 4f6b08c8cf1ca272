"""Learned gates: a trained factor on every structure; those whose factor falls to zero are removed."""
