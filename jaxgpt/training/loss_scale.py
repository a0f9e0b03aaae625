"""Dynamic loss scaling for float16, whose smallest gradients would otherwise round to zero.

The loss of each micro-batch is multiplied by a power of two, and its gradients divided by it in
float32. A step whose gradient overflows is skipped and halves the scale; many good steps double it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

START = 2.0**16
GROWTH_INTERVAL = 2000  # good steps in a row before the scale doubles
LARGEST = 2.0**24  # as in NVIDIA's Apex


class LossScale(NamedTuple):
    """The scale of a run in float16, as it is in its state."""

    scale: jax.Array  # (), float32: the loss is multiplied by it
    good_steps: jax.Array  # (), int32: since the scale changed
    overflows: jax.Array  # (), int32: steps skipped because a scaled gradient overflowed

    @classmethod
    def initial(cls) -> "LossScale":
        """The scale before the first step."""
        return cls(jnp.float32(START), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def overflowed(self, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
        """Whether (), bool, a smaller scale could make this step's gradient finite."""
        return jnp.isfinite(loss) & ~jnp.isfinite(grad_norm) & (self.scale > 1)

    def after(self, overflowed: jax.Array, finite: jax.Array) -> "LossScale":
        """The scale for the next step; `finite`: whether loss and gradient were."""
        good_steps = jnp.where(finite, self.good_steps + 1, 0)
        grow = (good_steps >= GROWTH_INTERVAL) & (self.scale < LARGEST)
        factor = jnp.where(overflowed, 0.5, jnp.where(grow, 2.0, 1.0))
        overflows = self.overflows + overflowed
        return LossScale(self.scale * factor, jnp.where(grow, 0, good_steps), overflows)
