"""Triton kernels of the head op, installed as `fastdpo.kernels`. Importing this package does not import triton."""
