"""Commands ended at random moments, alone and beside one another: nothing is lost, nothing unfinished is left."""
