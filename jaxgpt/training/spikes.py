"""Loss spikes: finite steps that are nevertheless better skipped, for those who ask for it."""

import jax
import jax.numpy as jnp

WINDOW = 128  # steps that a spike is judged by, once half of them are there (OLMo-core's numbers)


def no_history() -> jax.Array:
    """(2, WINDOW) float32: losses and gradient norms of the newest steps, 0 where there is none."""
    return jnp.zeros((2, WINDOW))


def add_to_history(recent: jax.Array, loss: jax.Array, norm: jax.Array) -> jax.Array:
    """`recent` with one step more and the oldest left out."""
    return jnp.concatenate([recent[:, 1:], jnp.stack([loss, norm])[:, None]], axis=1)


def is_spike(recent: jax.Array, loss: jax.Array, norm: jax.Array, deviations: float) -> jax.Array:
    """(), bool: whether loss or norm lies that many standard deviations above the recent mean.

    Never before WINDOW / 2 steps. As OLMo-core's SkipStepOptimizer, which takes 6 deviations.
    """
    known = recent > 0
    count = jnp.maximum(known.sum(axis=1), 1)
    mean = recent.sum(axis=1) / count
    variance = jnp.where(known, (recent - mean[:, None]) ** 2, 0).sum(axis=1) / count
    above = jnp.stack([loss, norm]) > mean + deviations * jnp.sqrt(variance)
    return (count >= WINDOW // 2).all() & above.any()
