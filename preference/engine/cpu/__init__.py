"""What the engine adds on a CPU: layers that keep less and products that use its cache."""
