"""Floor 1: gene vocabulary, rank value encoding, reading cells, batching (numpy, scipy, pyarrow)."""
