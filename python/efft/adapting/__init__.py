"""Adapt models in place, and restore them."""
