"""Optimizers and learning rates by their names in transformers: which there are, what they take, how a run begins."""
