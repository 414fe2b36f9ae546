"""What to do: where the experts go, how good that is, and the proof."""
