"""One training step of a whole model, under several ways to adapt it."""
