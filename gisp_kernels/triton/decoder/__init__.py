"""Kernels of :mod:`gisp_kernels.ops.decoder`."""
