"""Which structures go: units, ranking, shares of the blocks and the schedule."""
