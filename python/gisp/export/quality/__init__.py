"""What rounding and compensation make of a point of a run, and where the base model lies meanwhile."""
