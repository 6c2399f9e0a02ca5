"""Layers that carry a state from token to token, over a packed row with shared prompts."""
