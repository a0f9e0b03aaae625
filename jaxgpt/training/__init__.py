"""What happens between two steps: the optimizer, the step, checkpoints and metrics."""
