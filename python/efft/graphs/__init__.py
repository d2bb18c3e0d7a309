"""Capture complete training steps and requests as CUDA graphs, so that one launch runs all their kernels."""
