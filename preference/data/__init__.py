"""Files -> checked rows, each fault with file, line and reason."""
