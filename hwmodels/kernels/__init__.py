"""Cost models of kernels with physical parameters: what a kernel takes, term by term."""
