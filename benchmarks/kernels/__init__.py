"""Kernels on real shapes beside eager torch, torch.compile and cuBLAS."""
