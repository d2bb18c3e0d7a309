"""Measure the speed and memory of efft-kernels. Installing the project does not install this package."""
