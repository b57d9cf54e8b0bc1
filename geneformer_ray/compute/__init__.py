"""Floor 2: model, training, embedding, perturbation, statistics (torch, numpy, scipy)."""
