"""The report of a run: its data, plots and page."""
