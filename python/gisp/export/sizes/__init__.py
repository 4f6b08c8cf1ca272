"""Sizes of an export: what formats there are and what they round to, how heads are laid out, what is stored."""
