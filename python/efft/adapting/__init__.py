"""Put updates into a model, in place, and take them out again."""
