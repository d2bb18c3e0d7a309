"""What of a model is adapted, and which layers share a tensor train; nothing here changes a model."""
