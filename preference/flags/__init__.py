"""Flags in general: how one is declared, written in words or in a YAML file, and checked. Knows none by name."""
