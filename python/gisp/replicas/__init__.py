"""Several processes, each with a whole model, that score the sequences of a step together and decide alike."""
