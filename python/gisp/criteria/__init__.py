"""Where the scores of a step come from, one idea per file; ``docs/criteria.md`` has the formulas and their sources."""
