"""Benchmarks of efft-kernels. Nothing in this package is installed."""
