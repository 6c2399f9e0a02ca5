"""Preference tuning: what the scripts are made of, one idea a file."""
