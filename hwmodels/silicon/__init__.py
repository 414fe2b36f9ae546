"""Measured kernel tables as a source: readers, what they leave out and why, interpolation."""
