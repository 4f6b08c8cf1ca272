"""What a run takes of time and memory, and where its layers lie that may be larger than the GPU."""
