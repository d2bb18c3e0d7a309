"""Measure one training step of a complete model, adapted in several ways."""
