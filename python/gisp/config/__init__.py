"""Options of a run: their declarations, presets and the criteria they can name."""
