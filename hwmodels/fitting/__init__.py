"""Fit the parameters of physical cost models on measured rows, and score them on others."""
