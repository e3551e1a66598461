"""Several copies of a network at once: one stack of weights, twins, stability."""
