"""Layers of a model that keep less for the backward, in the same numbers: on a CPU and on CUDA."""
