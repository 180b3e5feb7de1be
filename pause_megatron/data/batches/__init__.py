"""Windows to micro-batches: which samples a rank reads in a step, and reading them ahead."""
