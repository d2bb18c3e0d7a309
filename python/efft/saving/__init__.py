"""Write, read, check and share adapter files."""
