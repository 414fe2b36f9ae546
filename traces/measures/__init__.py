"""Statistics of a trace as accumulators: fed chunk by chunk, merged file by file."""
