"""Damaged files for every reader: each ends in what the sound file gives or in one line."""
