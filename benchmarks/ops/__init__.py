"""Measure one adapted linear layer: every way to add the low-rank update, compared with the frozen layer."""
