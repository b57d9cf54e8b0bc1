"""Floor 4: Ray clusters, Ray Train workers, Ray Data pipelines: the only files here that import ray."""
