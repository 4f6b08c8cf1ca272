"""A dense decoder: its structures, how it shrinks and grows back, how it is loaded."""
