"""What `moeplan validate` can measure; by itself, so that the command line needs nothing heavy."""

SECTIONS = ("operators", "steps", "parallel", "offload")
"""Operators on fresh shapes, steps of a real decoder, expert parallel, experts behind a cache."""
