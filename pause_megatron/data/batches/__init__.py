"""Windows to micro-batches: the sampler of a data-parallel rank, collation, and a loader that prefetches steps."""
