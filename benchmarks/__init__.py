"""Benchmarks of efft-kernels; nothing here is installed."""
