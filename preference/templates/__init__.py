"""Rows -> text: chat templates and which one a run uses."""
