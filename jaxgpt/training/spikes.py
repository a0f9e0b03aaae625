"""Loss spikes: finite but harmful steps, which `--skip-spikes` skips."""

import jax
import jax.numpy as jnp

WINDOW = 128  # steps in the statistics, which are used once half of them exist (as OLMo-core)


def empty_history() -> jax.Array:
    """(2, WINDOW) float32: losses and gradient norms of the latest steps, 0 where there is none."""
    return jnp.zeros((2, WINDOW))


def add_to_history(recent: jax.Array, loss: jax.Array, norm: jax.Array) -> jax.Array:
    """`recent` with a new step appended and the oldest dropped."""
    return jnp.concatenate([recent[:, 1:], jnp.stack([loss, norm])[:, None]], axis=1)


def is_spike(recent: jax.Array, loss: jax.Array, norm: jax.Array, deviations: float) -> jax.Array:
    """(), bool: whether loss or norm is more than `deviations` standard deviations above the mean.

    Always False in the first WINDOW / 2 steps. After OLMo-core's SkipStepOptimizer, which uses 6.
    """
    known = recent > 0
    count = jnp.maximum(known.sum(axis=1), 1)
    mean = recent.sum(axis=1) / count
    variance = jnp.where(known, (recent - mean[:, None]) ** 2, 0).sum(axis=1) / count
    above = jnp.stack([loss, norm]) > mean + deviations * jnp.sqrt(variance)
    return (count >= WINDOW // 2).all() & above.any()
