"""Triton kernels of the head op, installed as `fastdpo.kernels`. Importing this loads no triton."""
