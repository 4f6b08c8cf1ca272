"""Triton kernels and their launchers. Importing a module here imports triton; nothing is compiled before a launch."""
