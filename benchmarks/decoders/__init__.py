"""Training of small decoders from scratch: the one that ships with ``gisp`` and a larger one for studies."""
