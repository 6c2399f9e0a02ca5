"""What a run shows and leaves: progress, evaluation, tables, the page."""
