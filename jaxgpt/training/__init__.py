"""One training step: optimizer, sharding, gradient accumulation, evaluation."""
