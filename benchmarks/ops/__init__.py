"""Measure several implementations of one linear layer with a low-rank update, compared with the frozen layer."""
