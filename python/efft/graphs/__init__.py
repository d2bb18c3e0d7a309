"""Capture whole training steps and whole requests as CUDA graphs, so that the host launches each of them at once."""
