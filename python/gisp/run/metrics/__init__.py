"""What a step is told by: phases and histograms, and the writers of experiment trackers."""
