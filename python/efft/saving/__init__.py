"""Adapter files: writing, reading, checking and sharing them."""
