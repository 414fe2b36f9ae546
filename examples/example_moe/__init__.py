"""A small Mixture-of-Experts language model, trained on text that any machine has."""
