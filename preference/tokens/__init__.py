"""Text -> token ids: rendering, encoding, filtering by length, the prepared cache."""
