"""Placing updates in a model, in place, and taking them out again."""
